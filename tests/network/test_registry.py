"""Names belong to the operator; what nodes say is a proposal."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from databases import Database
from gridmill.network import registry as registry_module
from gridmill.network.detokenise import ClassText
from gridmill.network.registry import Registry, UnknownModel
from gridmill.wire.classes import ClassId, ModelClass, TextFacts, facts_bytes
from gridmill.wire.messages import ClassOffer, NodeId, OwnerId

FACTS = TextFacts(
    chat_template="x", special_tokens={}, eos_token_ids=(1,), context_tokens=128, vocab_size=300, toy=True
)


def model_class(tokenizer: str = "a") -> ModelClass:
    import hashlib

    return ModelClass(
        weights=(),
        arithmetic="echo",
        kv_dtype="none",
        sampler_version=1,
        tokenizer_sha256=tokenizer * 64,
        text_facts_sha256=hashlib.sha256(facts_bytes(FACTS)).hexdigest(),
    )


def offer(name: str = "demo", tokenizer: str = "a", slots: int = 4) -> ClassOffer:
    return ClassOffer(name, model_class(tokenizer), slots, "echo")


class NoText:
    """Stands where a ClassText would: the registry only hands it on."""


TEXT: ClassText = NoText()  # type: ignore[assignment]


def with_registry(database: Database, body: Callable[[Registry], Awaitable[None]], approve: str = "open") -> None:
    async def run() -> None:
        store = database.store(wall_clock=lambda: 1000.0)
        await store.open((registry_module.MIGRATION,))
        try:
            made = Registry(store, approve=approve, now=lambda: 1000.0)  # type: ignore[arg-type]
            await made.load()
            await body(made)
        finally:
            await store.close()

    asyncio.run(run())


async def served(made: Registry, *offers: ClassOffer, node: str = "node-1") -> object:
    record = made.join(NodeId(node), OwnerId("owner-1"), "test")
    for each in offers:
        await made.learn_class(each.model_class, FACTS, TEXT)
        await made.approve(each.name, each.model_class.class_id, by="test")
    made.offer(record, offers)
    return record


def test_a_served_name_resolves_to_its_class_and_survives_a_restart(database: Database) -> None:
    async def first(made: Registry) -> None:
        await served(made, offer())
        card = made.resolve("demo")
        assert (card.class_id, card.toy, card.facts) == (model_class().class_id, True, FACTS)
        assert [c.name for c in made.model_cards()] == ["demo"]

    async def restarted(made: Registry) -> None:
        assert made.resolve("demo").class_id == model_class().class_id
        assert made.snapshot().by_class == {}

    with_registry(database, first)
    with_registry(database, restarted)


def test_a_name_at_a_class_selects_that_one_and_nothing_else(database: Database) -> None:
    async def body(made: Registry) -> None:
        await served(made, offer(tokenizer="a"), offer(tokenizer="b"))
        for tokenizer in "ab":
            class_id = model_class(tokenizer).class_id
            assert made.resolve(f"demo@{class_id[:8]}").class_id == class_id
        with pytest.raises(UnknownModel, match="has no class"):
            made.resolve("demo@00000000")
        with pytest.raises(UnknownModel):
            made.resolve(f"demo@{model_class().class_id[:3]}")

    with_registry(database, body)


def test_an_unknown_name_comes_with_the_nearest_known_ones(database: Database) -> None:
    async def body(made: Registry) -> None:
        await served(made, offer("gridmill/demo"), offer("other", tokenizer="b"))
        with pytest.raises(UnknownModel) as caught:
            made.resolve("Gridmil/Demo")
        assert caught.value.nearest[0] == "gridmill/demo"
        with pytest.raises(UnknownModel):
            made.resolve("x" * 100_000)

    with_registry(database, body)


def test_under_an_operator_an_unapproved_offer_is_listed_and_not_served(database: Database) -> None:
    async def body(made: Registry) -> None:
        record = made.join(NodeId("node-1"), OwnerId("owner-1"), "test")
        assert not made.may_serve(offer(), record.node_id)
        made.hold_back(record, [offer()])
        assert [pending.name for pending in made.pending()] == ["demo"]
        with pytest.raises(UnknownModel, match="gridmill classes approve demo"):
            made.resolve("owner-1/demo")
        await made.approve("demo", model_class().class_id, by="operator")
        assert made.may_serve(offer(), record.node_id)
        made.leave(record)
        assert made.pending() == []

    with_registry(database, body, approve="operator")


def test_the_first_class_with_a_free_place_serves_a_plain_name(database: Database) -> None:
    async def body(made: Registry) -> None:
        first = await served(made, offer(tokenizer="a", slots=1), node="node-1")
        await served(made, offer(tokenizer="b"), node="node-2")
        assert made.resolve("demo").class_id == model_class("a").class_id
        made.begin(first, model_class("a").class_id)  # type: ignore[arg-type]
        assert made.resolve("demo").class_id == model_class("b").class_id
        made.end(first, model_class("a").class_id)  # type: ignore[arg-type]
        made.leave(first)  # type: ignore[arg-type]
        assert made.resolve("demo").class_id == model_class("b").class_id

    with_registry(database, body)


def test_views_in_hand_do_not_change(database: Database) -> None:
    async def body(made: Registry) -> None:
        record = await served(made, offer())
        class_id = model_class().class_id
        before = made.snapshot().by_class[class_id]
        made.begin(record, class_id)  # type: ignore[arg-type]
        assert before[0].in_flight == 0
        assert made.snapshot().by_class[class_id][0].in_flight == 1
        made.leave(record)  # type: ignore[arg-type]
        assert len(before) == 1 and class_id not in made.snapshot().by_class

    with_registry(database, body)


def test_the_record_of_an_older_conversation_does_not_take_the_newer_one_along(database: Database) -> None:
    async def body(made: Registry) -> None:
        older = await served(made, offer())
        newer = await served(made, offer())
        made.leave(older)  # type: ignore[arg-type]
        assert made.record_of(NodeId("node-1")) is newer
        assert made.snapshot().by_class[model_class().class_id]

    with_registry(database, body)


def test_text_facts_of_another_class_are_refused(database: Database) -> None:
    async def body(made: Registry) -> None:
        other = TextFacts(chat_template="y", special_tokens={}, eos_token_ids=(), context_tokens=9, vocab_size=9)
        with pytest.raises(ValueError, match="do not belong"):
            await made.learn_class(model_class(), other, TEXT)

    with_registry(database, body)


@pytest.mark.parametrize("name", ["", "a@b", "a b", "x" * 201, "a\n"])
def test_unusable_model_names_cannot_be_approved(database: Database, name: str) -> None:
    async def body(made: Registry) -> None:
        with pytest.raises(ValueError, match="model name"):
            await made.approve(name, ClassId("0" * 64), by="operator")

    with_registry(database, body)


def test_whoever_waits_is_told_when_a_place_may_be_free(database: Database) -> None:
    async def body(made: Registry) -> None:
        told: list[str] = []
        made.changed = told.append
        record = await served(made, offer())
        class_id = model_class().class_id
        made.begin(record, class_id)  # type: ignore[arg-type]
        told.clear()
        made.end(record, class_id)  # type: ignore[arg-type]
        assert told == [class_id]
        made.leave(record)  # type: ignore[arg-type]
        assert told == [class_id, class_id]

    with_registry(database, body)
