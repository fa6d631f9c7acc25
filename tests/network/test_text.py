"""Templates and tokenizers of strangers: equal to transformers when they behave, named errors when they do not."""

from __future__ import annotations

import asyncio
import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import STREAMABLE, byte_level, facts_for, llama2_like, text_of
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gridmill.network.text import TextBreach, TextError, TextService
from gridmill.network.text_messages import (
    REPLY_HEADER,
    EncodeChat,
    Ids,
    Load,
    Loaded,
    Problem,
    reply_frame,
    request_frame,
)
from gridmill.network.text_process import _environment
from gridmill.network.text_worker import ChatTemplate, Refused
from gridmill.wire.classes import TOKENIZER_BYTES_MAX, TextFacts, facts_bytes

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
CHATML = TEMPLATES["chatml"]
HELLO = [{"role": "user", "content": "Hello there"}]
NOON = datetime.datetime(2026, 2, 3, 12, 0, 0)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MEMORY_BYTES = 256 << 20
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
A_SECOND = "{% for i in range(99999) %}{% for j in range(20) %}{% endfor %}{% endfor %}"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What the sky <does> & why, in “quotes”.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Naïve name", "enum": ["Århus", "Kyïv"]},
                "days": {"type": "integer"},
                "hours": {"type": "array", "items": {"type": "number"}},
                "units": {"type": ["string", "null"]},
            },
            "required": ["city"],
        },
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Århus"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one user": HELLO,
    "system": [{"role": "system", "content": "Be brief. /no_think"}, *HELLO],
    "turns": [
        {"role": "user", "content": "  Hi \n\n there  "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
        {"role": "user", "content": "And 你好 🙂 “naïve” <&>"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "Bye"},
    ],
    "two users in a row": [*HELLO, *HELLO],
    "tool call": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "I should look."},
        {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "abcdefghi", "name": "get_weather"},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": " two"}]},
    ],
    "reasoning": [*HELLO, {"role": "assistant", "content": "Yes", "reasoning_content": "why\nnot"}],
    "odd role": [{"role": "narrator", "content": "Once"}, {"role": "user", "content": ""}],
    "no content": [{"role": "user"}],
    "no role": [{"content": "x"}],
    "none": [],
}


class FrozenTime(datetime.datetime):
    @classmethod
    def now(cls, tz: object = None) -> Any:
        return NOON


# ---------------------------------------------------------------- equal to transformers


def ours(template: str, messages: list[dict[str, Any]], tools: Any, generate: bool) -> tuple[str, str]:
    try:
        return "text", compiled(template).render(messages, tools, generate, SPECIAL, NOON.timestamp())
    except Refused as refusal:
        return "error", refusal.code


@functools.cache
def compiled(template: str) -> ChatTemplate:
    return ChatTemplate(template)


def theirs(template: str, messages: list[dict[str, Any]], tools: Any, generate: bool) -> tuple[str, str]:
    # What PreTrainedTokenizerBase.apply_chat_template does before and around the rendering.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            [chat], tools=tools, chat_template=template, add_generation_prompt=generate, **SPECIAL
        )
        return "text", rendered[0]
    except Exception as error:  # noqa: BLE001 whatever it is, ours must end so too
        refused = type(error).__name__ == "TemplateError"
        return "error", "template_refused" if refused else "template_error"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_as_transformers_renders_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", FrozenTime)
    rendered = 0
    for messages in CONVERSATIONS.values():
        for tools in (None, [], [TOOL], [TOOL, TOOL]):
            for generate in (True, False):
                arguments = (TEMPLATES[name], messages, tools, generate)
                assert ours(*arguments) == theirs(*arguments)
                rendered += ours(*arguments)[0] == "text"
    assert rendered >= 16  # not all of it can be errors


@given(st.text(alphabet="{}%-#'\"|. \n()[]=+abx01~_", max_size=40))
@settings(max_examples=300, deadline=None)
def test_scribbled_templates_end_as_they_end_in_transformers(scribble: str) -> None:
    template = "{% set x = 1 %}" + scribble
    try:
        compiled(template)
    except Refused as refusal:
        assert refusal.code == "template_invalid"
        with pytest.raises(Exception):  # noqa: B017 whatever the compiler raises
            chat_template_utils._compile_jinja_template(template)
        return
    kind, answer = ours(template, HELLO, None, True)
    their_kind, their_answer = theirs(template, HELLO, None, True)
    assert kind == their_kind
    if kind == "text":
        assert answer == their_answer


@pytest.mark.parametrize("make", [byte_level, llama2_like])
def test_chats_encode_to_the_ids_of_apply_chat_template(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", eos_token="</s>")

    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=20)
        async with running(service, tmp_path):
            for name in ("chatml", "llama2", "llama3", "qwen_tools", "zephyr"):
                await register(service, tmp_path, make(), TEMPLATES[name], name)
                for conversation in ("one user", "system"):
                    for generate in (True, False):
                        messages = CONVERSATIONS[conversation]
                        expected = reference.apply_chat_template(
                            messages, chat_template=TEMPLATES[name], add_generation_prompt=generate, return_dict=False
                        )
                        found = await service.encode_chat(name, messages, add_generation_prompt=generate)
                        assert found == expected
            with_tools = await service.encode_chat("qwen_tools", HELLO, tools=[TOOL])
            assert with_tools == reference.apply_chat_template(
                HELLO,
                tools=[TOOL],
                chat_template=TEMPLATES["qwen_tools"],
                add_generation_prompt=True,
                return_dict=False,
            )

    asyncio.run(body())


def test_plain_text_encodes_with_and_without_the_special_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as service:
            with_special = await service.encode("model", "Hello there")
            without = await service.encode("model", "Hello there", add_special_tokens=False)
            assert with_special == byte_level().encode("Hello there").ids
            assert with_special == [byte_level().token_to_id("<s>"), *without]

    asyncio.run(body())


def test_templates_are_told_the_time_that_the_service_was_given(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, now_seconds=NOON.timestamp)
        async with running(service, tmp_path, template="{{ strftime_now('%Y-%m-%d') }}"):
            ids = await service.encode_chat("model", HELLO)
            assert byte_level().decode(ids) == "2026-02-03"

    asyncio.run(body())


@pytest.mark.parametrize("make", STREAMABLE)
def test_the_table_of_a_class_is_the_same_whether_a_worker_or_we_compute_it(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    async def body() -> None:
        service = TextService(workers=1)
        await service.start()
        try:
            text = await register(service, tmp_path, make(), CHATML)
        finally:
            await service.close()
        expected = text_of(make())
        assert text.texts == expected.texts
        assert text.special_ids == expected.special_ids
        assert text.facts.chat_template == CHATML

    asyncio.run(body())


# ---------------------------------------------------------------- templates that misbehave


MISBEHAVING = {
    "{{ raise_exception('System role not supported') }}": "template_refused",
    "{{ range(10**12) | list }}": "template_error",
    "{{ ().__class__.__bases__[0].__subclasses__() }}": "template_error",
    "{{ ''.format.__globals__.os }}": "template_error",
    "{{ '{0.__class__.__mro__}'.format(messages) }}": "template_error",
    "{{ messages.append(1) }}": "template_error",
    "{{ namespace(_x=1) }}": "template_error",
    "{{ strftime_now.__self__._template }}": "template_error",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "template_error",
    "{% include '/etc/passwd' %}": "template_error",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "template_error",
    "{{ nothing.at.all }}": "template_error",
    "{{ 1 / 0 }}": "template_error",
    "{{ 'x'.encode('no-such-codec') }}": "template_error",
    "{{ '\\ud800' }}": "encode_failed",
    "{% for i in range(60000) %}{{ 'x' * 1000 }}{% endfor %}": "template_output",
}


def test_a_template_that_misbehaves_is_a_named_error_and_the_worker_lives_on(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=20)
        async with running(service, tmp_path):
            before = children()
            for template, code in MISBEHAVING.items():
                await register(service, tmp_path, byte_level(), template, "bad")
                error = await failure(service.encode_chat("bad", HELLO))
                assert (template, error.code) == (template, code)
                assert len(error.detail) <= 500
            assert children() == before
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ ['x'] * 10**9 }}",
    ],
)
def test_a_template_that_eats_memory_is_a_breach_for_its_caller_alone(template: str, tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=20, memory_bytes=MEMORY_BYTES)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), template, "bad")
            error = await failure(service.encode_chat("bad", HELLO))
            assert isinstance(error, TextBreach)
            assert error.code == "text_memory"
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


@pytest.mark.parametrize("template", [FOREVER, "{{ (messages | length + 2) ** 900000000 }}"])
def test_a_template_that_never_ends_is_ended_even_inside_one_long_operation(template: str, tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=1.0)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), template, "bad")
            error = await failure(service.encode_chat("bad", HELLO))
            assert isinstance(error, TextBreach)
            assert error.code == "text_time"
            assert error.fault == "class"
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_refusal_carries_the_words_of_the_template_shortened(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path, template="{{ raise_exception('Sorry, no. ' * 1000) }}") as service:
            error = await failure(service.encode_chat("model", HELLO))
            assert error.code == "template_refused"
            assert error.fault == "caller"
            assert error.detail.startswith("Sorry, no. Sorry")
            assert len(error.detail) <= 500

    asyncio.run(body())


def test_a_template_that_does_not_compile_is_refused_at_registration(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as service:
            for template in ("{% for x in %}", "{{ x | no_such_filter }}", "{%", "{% if " + "(" * 5000):
                error = await failure(register(service, tmp_path, byte_level(), template, "bad"))
                assert (template[:9], error.code) == (template[:9], "template_invalid")
                assert error.fault == "class"
                assert (await failure(service.encode_chat("bad", HELLO))).code == "class_unknown"

    asyncio.run(body())


@pytest.mark.parametrize("template", [None, ""])
def test_a_model_without_a_template_says_where_it_can_be_asked(template: str | None, tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path, template=template) as service:
            error = await failure(service.encode_chat("model", HELLO))
            assert (error.code, error.fault) == ("template_missing", "caller")
            assert "/v1/completions" in error.detail
            assert await service.encode("model", "Hello")

    asyncio.run(body())


# ---------------------------------------------------------------- tokenizers that misbehave


def one_very_long_token() -> bytes:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens(["x" * 20_000])
    return tokenizer.to_str().encode()


NONSENSE = (
    (b"", "tokenizer_invalid"),
    (bytes(range(256)) * 4, "tokenizer_invalid"),
    (b"null", "tokenizer_invalid"),
    (b'{"version": "1.0", "model": {"type": "BPE", "vocab": 7, "merges": []}}', "tokenizer_invalid"),
    (b"[" * 2_000_000, "tokenizer_invalid"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "tokenizer_invalid"),
    (byte_level().to_str().encode()[:-20], "tokenizer_invalid"),
    (one_very_long_token(), "tokenizer_invalid"),
    (Tokenizer(models.WordLevel({}, "[UNK]")).to_str().encode(), "tokenizer_unsupported"),
)


def test_nonsense_tokenizer_files_are_refused_and_the_worker_lives_on(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1)
        async with running(service, tmp_path):
            before = children()
            for content, code in NONSENSE:
                path = tmp_path / "nonsense.json"
                path.write_bytes(content)
                error = await failure(service.register("bad", path, facts_for(byte_level(), CHATML)))
                assert (content[:40], error.code) == (content[:40], code)
                assert error.fault == "class"
                assert len(error.detail) <= 500
            assert children() == before
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_tokenizer_file_that_is_missing_or_too_big_never_reaches_a_worker(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as service:
            facts = facts_for(byte_level(), CHATML)
            assert (await failure(service.register("bad", tmp_path / "none.json", facts))).code == "tokenizer_missing"
            big = tmp_path / "big.json"
            with big.open("wb") as file:
                file.truncate(TOKENIZER_BYTES_MAX + 1)  # sparse
            assert (await failure(service.register("bad", big, facts))).code == "tokenizer_invalid"

    asyncio.run(body())


def test_a_regular_expression_that_explodes_is_stopped(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(a|a|aa)+(a|aa)+(a|aa)+$"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=1.0)
        async with running(service, tmp_path):
            await register(service, tmp_path, tokenizer, CHATML, "bad")
            error = await failure(service.encode("bad", ("a" * 200 + "b") * 20))
            assert error.code in ("text_time", "encode_failed", "text_crash")
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_prompt_with_an_id_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens([AddedToken("<beyond>")])

    async def body() -> None:
        service = TextService(workers=1)
        async with running(service, tmp_path):
            path = tmp_path / "beyond.json"
            path.write_text(tokenizer.to_str())
            await service.register("beyond", path, facts_for(tokenizer, CHATML, padding_ids=-1))
            assert await service.encode("beyond", "within")
            error = await failure(service.encode("beyond", "a <beyond> b"))
            assert (error.code, error.fault) == ("id_outside_vocabulary", "caller")

    asyncio.run(body())


@pytest.mark.parametrize(
    "answer",
    [
        reply_frame(Ids(b"abc")),  # no whole number of ids
        reply_frame(Ids(b"\xff" * 8)),  # ids outside the vocabulary
        reply_frame(Loaded()),  # the answer to another question
        reply_frame(Problem("made_up", "x" * 10_000)),
        REPLY_HEADER.pack(3) + b"\xc1\xc1\xc1",
        REPLY_HEADER.pack(2**31),
        reply_frame(Ids(b"")) * 2,
    ],
)
def test_an_answer_that_no_honest_worker_gives_is_a_named_error(answer: bytes, tmp_path: Path) -> None:
    """A template that broke out of every cage would own its worker's pipe, and nothing else."""

    async def body() -> None:
        async with served(tmp_path, template=FOREVER) as service:
            call = asyncio.create_task(service.encode_chat("model", HELLO))
            await worker_in_a_call(service)
            (worker,) = service._workers
            worker.pipe_data_received(1, answer)
            error = await failure(call)
            assert error.code in ("tokenizer_invalid", "id_outside_vocabulary", "made_up", "text_crash")
            assert len(error.detail) <= 500

    asyncio.run(body())


# ---------------------------------------------------------------- callers that misbehave


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_messages_that_are_no_text_are_the_callers_error(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as service:
            for content in ("\ud800", 2**70, nested(100_000), nested(3000), {"x": object()}, 7):
                error = await failure(service.encode_chat("model", [{"role": "user", "content": content}]))
                assert error.code in ("messages_invalid", "template_error")
                assert error.fault == "caller"
                assert len(error.detail) <= 500
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_prompt_that_cannot_fit_the_context_is_refused_before_any_work(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as service:
            error = await failure(service.encode("model", "a" * (9 << 20)))
            assert (error.code, error.fault) == ("prompt_too_long", "caller")
            assert len(await service.encode("model", "word " * 20_000)) > 20_000  # over the context, but not absurd

    asyncio.run(body())


def test_an_unknown_class_is_a_named_error_and_so_is_a_forgotten_one(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as service:
            assert (await failure(service.encode("other", "x"))).code == "class_unknown"
            service.forget("model")
            assert (await failure(service.encode("model", "x"))).code == "class_unknown"

    asyncio.run(body())


# ---------------------------------------------------------------- the pool


def test_a_breach_costs_one_caller_and_all_that_wait_behind_it_are_served(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=1.0)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), FOREVER, "bad")
            expected = await service.encode_chat("model", HELLO)
            bad = asyncio.create_task(service.encode_chat("bad", HELLO))
            await asyncio.sleep(0)
            good = await asyncio.gather(*(service.encode_chat("model", HELLO) for _ in range(50)))
            assert good == [expected] * 50
            assert (await failure(bad)).code == "text_time"

    asyncio.run(body())


def test_a_class_that_breaches_three_times_is_refused_at_once_for_a_while_and_others_are_not(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=0.5, quarantine_seconds=2.0)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), FOREVER, "bad")
            codes = [(await failure(service.encode_chat("bad", HELLO))).code for _ in range(4)]
            assert codes == ["text_time"] * 3 + ["class_quarantined"]
            assert (await failure(register(service, tmp_path, byte_level(), CHATML, "bad"))).code == "class_quarantined"
            assert len(await service.encode_chat("model", HELLO)) > 4
            while (await failure(service.encode_chat("bad", HELLO))).code == "class_quarantined":
                await asyncio.sleep(0.1)

    asyncio.run(body())


def test_a_long_prompt_that_breaches_does_not_count_against_its_class(tmp_path: Path) -> None:
    template = "{% if messages[0].content | length > 99 %}" + FOREVER + "{% endif %}{{ messages[0].content }}"

    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=0.5)
        async with running(service, tmp_path, template=template):
            for _ in range(4):
                long = [{"role": "user", "content": "x" * 70_000}]
                assert (await failure(service.encode_chat("model", long))).code == "text_time"
            assert await service.encode_chat("model", HELLO)

    asyncio.run(body())


def test_slow_classes_leave_a_worker_to_the_others(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=2, call_timeout_seconds=20)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), A_SECOND, "slow")
            await service.encode_chat("slow", HELLO)  # from here on it is known to be slow
            slow = [asyncio.create_task(service.encode_chat("slow", HELLO)) for _ in range(6)]
            await asyncio.sleep(0)
            for _ in range(30):
                await service.encode_chat("model", HELLO)
            assert sum(task.done() for task in slow) < 4
            assert all(ids == [] for ids in await asyncio.gather(*slow))

    asyncio.run(body())


def test_too_many_waiting_calls_are_told_to_come_back(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=20)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), A_SECOND, "slow")
            slow = asyncio.create_task(service.encode_chat("slow", HELLO))
            await asyncio.sleep(0)
            outcomes = await asyncio.gather(
                *(service.encode_chat("model", HELLO) for _ in range(300)), return_exceptions=True
            )
            busy = [outcome for outcome in outcomes if isinstance(outcome, TextError)]
            assert {(error.code, error.fault) for error in busy} == {("text_busy", "network")}
            assert len(busy) == 300 - 256
            await slow

    asyncio.run(body())


def test_more_classes_than_a_worker_holds_are_loaded_again_when_asked(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=2, classes_per_worker=1)
        await service.start()
        try:
            for name in ("a", "b", "c"):
                await register(service, tmp_path, byte_level(), name + "{{ messages[0].content }}", name)
            for name in ("a", "b", "c", "a", "a", "c"):
                ids = await service.encode_chat(name, HELLO)
                assert byte_level().decode(ids) == name + "Hello there"
        finally:
            await service.close()

    asyncio.run(body())


def test_callers_who_leave_take_nothing_with_them(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=20)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), A_SECOND, "slow")
            before = children()
            running_call = asyncio.create_task(service.encode_chat("slow", HELLO))
            await asyncio.sleep(0.1)
            waiting_calls = [asyncio.create_task(service.encode_chat("slow", HELLO)) for _ in range(20)]
            await asyncio.sleep(0)
            for task in (running_call, *waiting_calls):
                task.cancel()
            await asyncio.gather(running_call, *waiting_calls, return_exceptions=True)
            assert len(await service.encode_chat("model", HELLO)) > 4
            assert children() == before  # the worker finished what nobody waits for, and lives

    asyncio.run(body())


def test_a_killed_worker_is_replaced_and_its_call_asked_again_once(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=2, call_timeout_seconds=30)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), A_SECOND + "done", "slow")
            await register(service, tmp_path, byte_level(), FOREVER, "forever")
            call = asyncio.create_task(service.encode_chat("slow", HELLO))
            os.kill(await worker_in_a_call(service), signal.SIGKILL)
            assert byte_level().decode(await call) == "done"

            hopeless = asyncio.create_task(service.encode_chat("forever", HELLO))
            first = await worker_in_a_call(service)
            os.kill(first, signal.SIGKILL)
            while (second := await worker_in_a_call(service)) == first:
                await asyncio.sleep(0.02)
            os.kill(second, signal.SIGKILL)
            error = await failure(hopeless)
            assert isinstance(error, TextBreach)
            assert error.code == "text_crash"
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_worker_that_crashes_is_a_named_error_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=30)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), FOREVER, "bad")
            call = asyncio.create_task(service.encode_chat("bad", HELLO))
            os.kill(await worker_in_a_call(service), signal.SIGSEGV)
            assert (await failure(call)).code == "text_crash"
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_worker_that_cannot_even_end_itself_is_ended(tmp_path: Path) -> None:
    async def body() -> None:
        service = TextService(workers=1, call_timeout_seconds=1.0)
        async with running(service, tmp_path):
            await register(service, tmp_path, byte_level(), FOREVER, "bad")
            call = asyncio.create_task(service.encode_chat("bad", HELLO))
            os.kill(await worker_in_a_call(service), signal.SIGSTOP)
            assert (await failure(call)).code == "text_time"
            assert len(await service.encode_chat("model", HELLO)) > 4

    asyncio.run(body())


def test_a_worker_ends_itself_when_its_time_is_up_and_when_nobody_asks_any_more() -> None:
    def worker_after(*requests: bytes) -> int:
        command = [sys.executable, "-m", "gridmill.network.text_worker", str(1 << 30)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stdin is not None
            for request in requests:
                process.stdin.write(request)
                process.stdin.flush()
            if requests:
                process.wait()  # the pipe stays open
            process.stdin.close()
            return process.wait()

    load = Load("bad", byte_level().to_str().encode(), facts_bytes(facts_for(byte_level(), FOREVER)), (), False)
    chat = EncodeChat("bad", HELLO, None, True, 0.0)
    assert worker_after(request_frame(load, 20.0), request_frame(chat, 0.5)) == -signal.SIGALRM
    assert worker_after() == 0


def test_closing_ends_calls_with_a_named_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def body() -> None:
        me = psutil.Process()
        service = TextService(workers=2)
        before, tasks, descriptors = children(), len(asyncio.all_tasks()), me.num_fds()
        await service.start()
        await register(service, tmp_path, byte_level(), FOREVER, "bad")
        calls = [asyncio.create_task(service.encode_chat("bad", HELLO)) for _ in range(4)]
        await asyncio.sleep(0.1)
        await service.close()
        assert {(await failure(call)).code for call in calls} == {"text_closed"}
        assert (await failure(service.encode("bad", "x"))).code == "text_closed"
        await service.close()
        assert children() == before
        assert len(asyncio.all_tasks()) == tasks
        assert me.num_fds() <= descriptors + 1  # the loop's own, made for its first child process

    asyncio.run(body())


def test_a_pool_that_cannot_start_says_so_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        before = children()
        error = await failure(TextService(memory_bytes=8 << 20).start())
        assert (error.code, error.fault) == ("text_unavailable", "network")
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        assert (await failure(TextService().start())).code == "text_unavailable"
        assert children() == before

    asyncio.run(body())


def test_the_same_service_runs_on_uvloop(tmp_path: Path) -> None:
    async def body() -> None:
        before = children()
        service = TextService(workers=2, call_timeout_seconds=1.0)
        async with running(service, tmp_path):
            expected = await service.encode_chat("model", HELLO)
            await register(service, tmp_path, byte_level(), FOREVER, "bad")
            assert (await failure(service.encode_chat("bad", HELLO))).code == "text_time"
            many = await asyncio.gather(*(service.encode_chat("model", HELLO) for _ in range(100)))
            assert many == [expected] * 100
        assert children() == before

    uvloop.run(body())


def test_workers_die_with_a_network_that_is_killed_even_while_they_loop(tmp_path: Path) -> None:
    tokenizer_path = tmp_path / "tokenizer.json"
    tokenizer_path.write_text(byte_level().to_str())
    program = textwrap.dedent(
        """
        import asyncio, pathlib, sys, psutil
        from gridmill.network.text import TextService
        from gridmill.wire.classes import parse_facts

        async def main(path, facts):
            service = TextService(workers=2, call_timeout_seconds=600)
            await service.start()
            await service.register("bad", pathlib.Path(path), parse_facts(facts.encode()))
            asyncio.create_task(service.encode_chat("bad", [{"role": "user", "content": "x"}]))
            await asyncio.sleep(0.1)
            print(*(child.pid for child in psutil.Process().children()), flush=True)
            await asyncio.sleep(600)

        asyncio.run(main(*sys.argv[1:]))
        """
    )
    facts = facts_for(byte_level(), FOREVER)
    content = json.dumps({name: getattr(facts, name) for name in TextFacts.__struct_fields__})
    network = subprocess.Popen(
        [sys.executable, "-c", program, str(tokenizer_path), content], stdout=subprocess.PIPE, text=True
    )
    try:
        assert network.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in network.stdout.readline().split()]
        assert len(workers) == 2
        network.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        network.kill()
        network.communicate()


def test_a_worker_can_open_no_file_and_no_socket_and_knows_none_of_our_environment() -> None:
    program = textwrap.dedent(
        """
        import os, socket, sys
        from gridmill.network import text_worker
        text_worker._warm_up()
        text_worker._give_up_the_outside()
        for attempt in (lambda: open("/etc/hostname"), socket.socket, os.pipe, lambda: open("/tmp/x", "w")):
            try:
                attempt()
            except OSError as error:
                print(error.errno)
            else:
                print("open")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["24"] * 4  # EMFILE
    assert set(_environment()) == {"PYTHONPATH", "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "LC_ALL"}


# ---------------------------------------------------------------- how the tests run a service


@asynccontextmanager
async def running(
    service: TextService, folder: Path, template: str | None = CHATML, tokenizer: Tokenizer | None = None
) -> AsyncIterator[TextService]:
    """`service` started, with a class called "model"."""
    await service.start()
    try:
        await register(service, folder, tokenizer or byte_level(), template)
        yield service
    finally:
        await service.close()


def served(folder: Path, template: str | None = CHATML, tokenizer: Tokenizer | None = None) -> Any:
    return running(TextService(workers=1, call_timeout_seconds=20), folder, template, tokenizer)


async def register(
    service: TextService, folder: Path, tokenizer: Tokenizer, template: str | None, class_id: str = "model"
) -> Any:
    path = folder / f"{class_id}.json"
    path.write_text(tokenizer.to_str())
    return await service.register(class_id, path, facts_for(tokenizer, template))


async def failure(call: Awaitable[Any]) -> TextError:
    with pytest.raises(TextError) as caught:
        await call
    return caught.value


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


async def worker_in_a_call(service: TextService) -> int:
    """The process id of a worker that has been asked and has not answered."""
    while True:
        for worker in service._workers:
            if worker.busy:
                assert worker.pid is not None
                return worker.pid
        await asyncio.sleep(0.02)
