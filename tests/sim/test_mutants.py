"""The simulation finds bugs: each of these is put into the code on purpose and must be caught within some seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gridmill.network import idempotency
from gridmill.network.books import Books
from gridmill.network.dispatch import Dispatcher
from gridmill.network.journey import Journey
from gridmill.network.links import NodeLink, NodeStream
from gridmill.network.orders import Order
from gridmill.network.registry import Registry
from gridmill.sim.model import ids_of
from gridmill.sim.seed import play
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import pack_ids

Mutate = Callable[[pytest.MonkeyPatch], None]
SEEDS_MAX = 60


def around(patch: pytest.MonkeyPatch, owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Replaces a method by what `make` makes of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def a_token_is_repeated(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        def what_is_left(self: Journey, row: Any) -> Generate:
            work = real(self, row)
            return msgspec.structs.replace(work, delivered=work.delivered[:-4]) if self.order.count else work

        return what_is_left

    around(patch, Journey, "_what_is_left", make)


def a_token_is_lost(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        def what_is_left(self: Journey, row: Any) -> Generate:
            work, count = real(self, row), self.order.count
            following = ids_of(self.work)[0][count : count + 1] if count else []
            return msgspec.structs.replace(work, delivered=work.delivered + pack_ids(following))

        return what_is_left

    around(patch, Journey, "_what_is_left", make)


def another_seed_goes_on(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        def what_is_left(self: Journey, row: Any) -> Generate:
            work = real(self, row)
            if not self.order.count or work.sampling.greedy:
                return work
            return msgspec.structs.replace(work, sampling=msgspec.structs.replace(work.sampling, seed=bytes(32)))

        return what_is_left

    around(patch, Journey, "_what_is_left", make)


def late_words_of_the_old_node_count(patch: pytest.MonkeyPatch) -> None:
    latest: dict[str, NodeStream] = {}
    heirs: dict[NodeStream, str] = {}

    def make_open(real: Any) -> Any:
        def open_(self: NodeLink, work: Generate, class_id: Any) -> NodeStream:
            stream: NodeStream = real(self, work, class_id)
            latest[work.work_id] = stream
            heirs[stream] = work.work_id
            return stream

        return open_

    def make_push(real: Any) -> Any:
        return lambda self, emission: real(latest[heirs[self]], emission)

    around(patch, NodeLink, "open", make_open)
    around(patch, NodeStream, "push", make_push)


def a_hold_is_leaked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Books, "release", lambda self, order: None)


def a_place_is_leaked(patch: pytest.MonkeyPatch) -> None:
    ends = itertools.count()

    def make(real: Any) -> Any:
        def end(self: Registry, record: Any, class_id: Any) -> None:
            if next(ends) % 20 != 19:
                real(self, record, class_id)

        return end

    around(patch, Registry, "end", make)


def what_was_moved_is_billed_twice(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        def all_parts(self: Order, *arguments: Any) -> list[Any]:
            parts = list(real(self, *arguments))
            if len(parts) > 1:
                last = parts[-1]
                more = last.used.output_tokens + parts[0].used.output_tokens
                parts[-1] = msgspec.structs.replace(last, used=msgspec.structs.replace(last.used, output_tokens=more))
            return parts

        return all_parts

    around(patch, Order, "all_parts", make)


def a_work_is_settled_twice(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        def settle(self: Books, order: Order, *arguments: Any, **options: Any) -> int:
            cost: int = real(self, order, *arguments, **options)
            order.settled = False
            real(self, order, *arguments, **options)
            return cost

        return settle

    around(patch, Books, "settle", make)


def a_work_runs_twice(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        async def serve(self: Dispatcher, *arguments: Any, **options: Any) -> Any:
            await real(self, *arguments, **options)
            return await real(self, *arguments, **options)

        return serve

    around(patch, Dispatcher, "serve", make)


def the_journal_does_not_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Order, "part_owed_count", property(lambda self: 0))


def a_retry_pays_the_prompt_again(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        return lambda *arguments: msgspec.structs.replace(real(*arguments), prompt_charged=False)

    patch.setattr(idempotency, "_part", make(idempotency._part))


def a_retry_uses_its_epochs_again(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        return lambda *arguments: msgspec.structs.replace(real(*arguments), epoch_next=0)

    patch.setattr(idempotency, "_part", make(idempotency._part))


@pytest.mark.parametrize(
    "mutate",
    [
        a_token_is_repeated,
        a_token_is_lost,
        another_seed_goes_on,
        late_words_of_the_old_node_count,
        a_hold_is_leaked,
        a_place_is_leaked,
        what_was_moved_is_billed_twice,
        a_work_is_settled_twice,
        a_work_runs_twice,
        the_journal_does_not_count,
        a_retry_pays_the_prompt_again,
        a_retry_uses_its_epochs_again,
    ],
    ids=lambda mutate: mutate.__name__,
)
def test_a_bug_that_is_put_in_is_found(mutate: Mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    for seed in range(SEEDS_MAX):
        if play(seed).problems:
            return
    raise AssertionError(f"{SEEDS_MAX} seeds passed with this bug in the code")
