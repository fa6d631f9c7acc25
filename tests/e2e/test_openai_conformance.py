"""What users of the official `openai` client rely on, against a running `gridmill up` over real sockets.

The native engine with the toy model answers wherever what is said matters a little; the echo engine wherever ids do.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import openai
import pytest
from conftest import Up
from programs import until

HELLO: Any = [{"role": "user", "content": "What is Gridmill?"}]


def chat(up: Up, **parameters: Any) -> Any:
    parameters = {"messages": HELLO, "max_tokens": 16, "temperature": 0, **parameters}
    return up.client.chat.completions.create(model=up.model, **parameters)


def complete(up: Up, prompt: Any = "Gridmill is", **parameters: Any) -> Any:
    parameters = {"max_tokens": 16, "temperature": 0, **parameters}
    return up.client.completions.create(model=up.model, prompt=prompt, **parameters)


def said(answer: Any) -> str:
    content = answer.choices[0].message.content
    assert isinstance(content, str)
    return content


def streamed(chunks: Any, index: int = 0) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


def refused(up: Up, error: type[openai.APIStatusError] = openai.BadRequestError, **parameters: Any) -> Any:
    with pytest.raises(error) as caught:
        chat(up, **parameters)
    assert caught.value.response.headers["x-gridmill-request-id"]
    assert caught.value.message
    return caught.value


# ---------------------------------------------------------------- models


def test_models_are_listed(demo: Up) -> None:
    models = demo.client.models.list().data
    assert [model.id for model in models] == [demo.model]
    assert models[0].object == "model"
    assert models[0].owned_by and models[0].created > 1_700_000_000


def test_a_model_is_retrieved_by_its_name(demo: Up) -> None:
    assert demo.client.models.retrieve(demo.model).id == demo.model


def test_the_toy_is_labelled_a_toy(demo: Up) -> None:
    extra = demo.client.models.retrieve(demo.model).model_extra
    assert extra and extra["gridmill"]["toy"] is True


def test_retrieving_a_model_that_is_not_there_is_not_found(demo: Up) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        demo.client.models.retrieve("gridmill/dmo")
    assert demo.model in caught.value.message


# ---------------------------------------------------------------- chat


def test_a_chat_is_answered(demo: Up) -> None:
    answer = chat(demo)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert said(answer)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_toy_knows_what_gridmill_is(demo: Up) -> None:
    assert "gridmill" in said(chat(demo, max_tokens=100)).lower()


def test_a_stream_says_what_the_plain_answer_says(demo: Up) -> None:
    chunks = list(chat(demo, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert streamed(chunks) == said(chat(demo))


def test_the_async_client_streams(demo: Up) -> None:
    async def body() -> str:
        async with demo.async_client() as client:
            stream = await client.chat.completions.create(
                model=demo.model, messages=HELLO, max_tokens=16, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(body()) == said(chat(demo))


def test_the_clients_own_stream_helper_accumulates_the_same_answer(demo: Up) -> None:
    with demo.client.chat.completions.stream(model=demo.model, messages=HELLO, max_tokens=200, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == said(chat(demo, max_tokens=200))


def test_a_system_prompt_changes_the_prompt(echo: Up) -> None:
    without = chat(echo)
    with_system = chat(echo, messages=[{"role": "system", "content": "Be brief."}, *HELLO])
    assert with_system.usage.prompt_tokens > without.usage.prompt_tokens
    assert said(with_system) != said(without)


def test_developer_is_the_newer_word_for_system(echo: Up) -> None:
    answers = [
        said(chat(echo, messages=[{"role": role, "content": "Be brief."}, *HELLO])) for role in ("system", "developer")
    ]
    assert answers[0] == answers[1]


def test_text_parts_are_one_text(echo: Up) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "Gridmill?"}]
    assert said(chat(echo, messages=[{"role": "user", "content": parts}])) == said(chat(echo))


def test_a_conversation_goes_on_with_the_answer_as_the_client_gave_it(demo: Up) -> None:
    first = chat(demo)
    second = chat(demo, messages=[*HELLO, first.choices[0].message, {"role": "user", "content": "And then?"}])
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert said(second)


def test_a_message_may_carry_a_name(demo: Up) -> None:
    assert said(chat(demo, messages=[{"role": "user", "content": "Hello", "name": "ann"}]))


def test_emoji_and_scripts_survive_in_both_directions(echo: Up) -> None:
    question = "naïve 你好 🦀👩‍👩‍👧 \u2028 \x00 ʔ"
    plain = complete(echo, question, max_tokens=200)
    text = plain.choices[0].text
    assert plain.usage.prompt_tokens == len(echo.tokenizer.encode(question).ids)
    assert text.encode("utf-8").decode() == text
    chunks = list(complete(echo, question, max_tokens=200, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


# ---------------------------------------------------------------- usage


def test_usage_counts_ids(echo: Up) -> None:
    usage = complete(echo, max_tokens=7).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(echo.tokenizer.encode("Gridmill is").ids), 7)


def test_include_usage_adds_one_last_chunk_without_choices(demo: Up) -> None:
    chunks = list(chat(demo, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump() == chat(demo).usage.model_dump() | {
        "prompt_tokens_details": chunks[-1].usage.prompt_tokens_details.model_dump()
    }
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_include_usage_no_chunk_has_usage(demo: Up) -> None:
    assert all(chunk.usage is None for chunk in chat(demo, stream=True))


def test_a_prompt_that_was_seen_before_is_cached(demo: Up) -> None:
    words = "Tell me everything about owners, nodes, tokens, receipts, seeds and streams. " * 3
    messages = [{"role": "user", "content": words}]
    chat(demo, messages=messages)
    usage = chat(demo, messages=messages).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_another_cache_salt_does_not_share(demo: Up) -> None:
    words = "Tell me nothing about owners, nodes, tokens, receipts, seeds and streams. " * 3
    messages = [{"role": "user", "content": words}]
    first = chat(demo, messages=messages, extra_body={"cache_salt": "ann"})
    other = chat(demo, messages=messages, extra_body={"cache_salt": "bob"})
    again = chat(demo, messages=messages, extra_body={"cache_salt": "ann"})
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert said(first) == said(other) == said(again)


# ---------------------------------------------------------------- choosing tokens


def test_temperature_zero_repeats_itself(demo: Up) -> None:
    assert said(chat(demo)) == said(chat(demo))


def test_a_seed_repeats_itself(demo: Up) -> None:
    answers = {complete(demo, temperature=2, seed=11, max_tokens=24).choices[0].text for _ in range(3)}
    assert len(answers) == 1


def test_other_seeds_say_other_things(demo: Up) -> None:
    answers = {complete(demo, temperature=2, seed=seed, max_tokens=24).choices[0].text for seed in range(4)}
    assert len(answers) > 1


def test_without_a_seed_each_request_has_its_own(echo: Up) -> None:
    assert said(chat(echo, temperature=1)) != said(chat(echo, temperature=1))


def test_three_choices_are_three_answers_to_one_prompt(demo: Up) -> None:
    answer = chat(demo, n=3, temperature=2, seed=3, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.prompt_tokens == chat(demo).usage.prompt_tokens
    assert answer.usage.completion_tokens > 24


def test_choices_stream_side_by_side_and_equal_the_plain_ones(demo: Up) -> None:
    parameters: Any = {"n": 3, "temperature": 2, "seed": 3, "max_tokens": 24}
    plain = chat(demo, **parameters)
    chunks = list(chat(demo, stream=True, **parameters))
    assert [streamed(chunks, index) for index in range(3)] == [choice.message.content for choice in plain.choices]
    assert sorted(c.index for chunk in chunks for c in chunk.choices if c.finish_reason) == [0, 1, 2]


def test_logit_bias_forces_and_bans_a_token(demo: Up) -> None:
    first, second = (demo.tokenizer.encode(f" {word}", add_special_tokens=False).ids[-1] for word in ("node", "token"))
    assert first != second
    for bias, wanted in (({str(first): 100}, first), ({str(first): -100, str(second): 100}, second)):
        answer = complete(demo, logit_bias=bias, max_tokens=5)
        assert answer.choices[0].text.strip() == demo.tokenizer.decode([wanted] * 5).strip()
        assert answer.choices[0].finish_reason == "length"


def test_a_presence_penalty_keeps_a_forced_token_from_coming_twice(demo: Up) -> None:
    forced = demo.tokenizer.encode(" node", add_special_tokens=False).ids[-1]
    free = complete(demo, logit_bias={str(forced): 30}, max_tokens=30, extra_body={"ignore_eos": True})
    tamed = complete(
        demo,
        logit_bias={str(forced): 30},
        max_tokens=30,
        frequency_penalty=2,
        presence_penalty=2,
        extra_body={"ignore_eos": True},
    )
    word = demo.tokenizer.decode([forced]).strip()
    assert tamed.choices[0].text.count(word) < free.choices[0].text.count(word)


@pytest.mark.parametrize(
    "parameters",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.5},
        {"top_p": 0.5},
        {"temperature": 2},
        {"extra_body": {"repetition_penalty": 1.3}},
        {"extra_body": {"top_k": 5, "min_p": 0.05}},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_every_sampling_parameter_is_taken(demo: Up, parameters: dict[str, Any]) -> None:
    assert chat(demo, **{"temperature": 1, **parameters}).usage.completion_tokens > 0


def test_top_k_one_is_greedy(demo: Up) -> None:
    assert said(chat(demo, temperature=2, extra_body={"top_k": 1})) == said(chat(demo))


# ---------------------------------------------------------------- where an answer ends


def test_max_tokens_is_exact_and_its_newer_name_means_the_same(echo: Up) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = echo.client.chat.completions.create(model=echo.model, messages=HELLO, **{name: 9})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (9, "length")


def test_an_answer_that_is_complete_says_stop(demo: Up) -> None:
    assert chat(demo, max_tokens=200).choices[0].finish_reason == "stop"


def test_a_stop_string_cuts_the_answer_before_it(demo: Up) -> None:
    whole = said(chat(demo, max_tokens=60))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = chat(demo, max_tokens=60, stop=stop)
    assert said(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_stop_string_is_found_over_token_borders_and_never_shown_in_a_stream(echo: Up) -> None:
    whole = complete(echo, max_tokens=60).choices[0].text
    tokens = [entry for entry in complete(echo, max_tokens=60, logprobs=0).choices[0].logprobs.tokens if entry]
    stop = next(
        whole[start : start + 5]
        for start in range(len(whole) // 3, len(whole) - 5)
        if "\ufffd" not in whole[start : start + 5] and not any(whole[start : start + 5] in token for token in tokens)
    )
    chunks = list(complete(echo, max_tokens=60, stop=[stop], stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_of_several_stop_strings_the_first_to_come_counts(demo: Up) -> None:
    whole = said(chat(demo, max_tokens=60))
    late, early = whole[30:34], whole[10:14]
    cut = min(whole.index(late), whole.index(early))
    assert said(chat(demo, max_tokens=60, stop=[late, early])) == whole[:cut]


def test_usage_ends_with_the_token_that_completed_the_stop_string(echo: Up) -> None:
    whole = complete(echo, max_tokens=60)
    stop = whole.choices[0].text[10:13]
    assert complete(echo, max_tokens=60, stop=stop).usage.completion_tokens < whole.usage.completion_tokens


def test_min_tokens_and_ignore_eos_make_answers_longer(demo: Up) -> None:
    natural = chat(demo, max_tokens=200).usage.completion_tokens
    longer = natural + 5
    forced = chat(demo, max_tokens=longer, extra_body={"min_tokens": longer})
    assert forced.usage.completion_tokens == longer
    endless = chat(demo, max_tokens=longer, extra_body={"ignore_eos": True})
    assert (endless.usage.completion_tokens, endless.choices[0].finish_reason) == (longer, "length")


def test_a_stop_token_id_ends_the_answer_and_is_not_shown(demo: Up) -> None:
    forced = demo.tokenizer.encode(" node", add_special_tokens=False).ids[-1]
    answer = complete(demo, logit_bias={str(forced): 100}, extra_body={"stop_token_ids": [forced]})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1


# ---------------------------------------------------------------- log probabilities


def test_logprobs_spell_the_answer_and_are_ordered(demo: Up) -> None:
    answer = chat(demo, logprobs=True, top_logprobs=5)
    entries = answer.choices[0].logprobs.content
    shown = [entry for entry in entries if entry.bytes]
    assert b"".join(bytes(entry.bytes) for entry in shown).decode("utf-8", "replace").strip() == said(answer).strip()
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 5
        assert tops == sorted(tops, reverse=True)
        assert sum(math.exp(logprob) for logprob in tops) <= 1 + 1e-4
        assert entry.logprob == tops[0] <= 0  # greedy


def test_logprobs_without_top_list_only_the_chosen(demo: Up) -> None:
    entries = chat(demo, logprobs=True).choices[0].logprobs.content
    assert entries and all(entry.top_logprobs == [] for entry in entries)


def test_streamed_logprobs_equal_the_plain_ones(demo: Up) -> None:
    parameters: Any = {"logprobs": True, "top_logprobs": 2}
    plain = chat(demo, **parameters).choices[0].logprobs.content
    chunks = chat(demo, stream=True, **parameters)
    entries = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert [entry.token for entry in entries] == [entry.token for entry in plain]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in plain], abs=1e-4)


def test_completion_logprobs_have_the_older_shape(demo: Up) -> None:
    choice = complete(demo, logprobs=3, max_tokens=6).choices[0]
    logprobs = choice.logprobs
    assert (
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    )
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob)


# ---------------------------------------------------------------- completions


def test_a_completion_is_answered_and_streams_the_same(demo: Up) -> None:
    plain = complete(demo)
    assert plain.object == "text_completion" and plain.id.startswith("cmpl-")
    assert "".join(chunk.choices[0].text for chunk in complete(demo, stream=True)) == plain.choices[0].text


def test_ids_are_as_good_as_their_text(echo: Up) -> None:
    ids = echo.tokenizer.encode("Gridmill is").ids
    assert complete(echo, ids).choices[0].text == complete(echo, "Gridmill is").choices[0].text


def test_each_prompt_of_a_list_is_its_own(echo: Up) -> None:
    ids = [echo.tokenizer.encode(text).ids for text in ("one", "two")]
    apart = [complete(echo, text).choices[0].text for text in ("one", "two")]
    for prompt in (["one", "two"], ids):
        answer = complete(echo, prompt)
        assert [choice.text for choice in answer.choices] == apart
        assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])


def test_several_prompts_stream_side_by_side(echo: Up) -> None:
    texts: dict[int, str] = {0: "", 1: ""}
    for chunk in complete(echo, ["one", "two"], stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in complete(echo, ["one", "two"]).choices]


@pytest.mark.parametrize("parameter", [{"echo": True}, {"suffix": "."}, {"best_of": 2}], ids=str)
def test_completion_parameters_that_come_later_are_refused_by_name(demo: Up, parameter: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(demo, **parameter)
    assert caught.value.param == next(iter(parameter))


# ---------------------------------------------------------------- headers and our own fields


def test_headers_name_the_request_and_the_node(demo: Up) -> None:
    raw = demo.client.chat.completions.with_raw_response.create(model=demo.model, messages=HELLO, max_tokens=4)
    answer: Any = raw.parse()
    assert raw.headers["x-gridmill-request-id"] == answer.id
    assert raw.headers["x-gridmill-node"] == demo.node_id
    assert answer.model_extra["gridmill"] == {"nodes": [demo.node_id], "request_id": answer.id}


def test_a_stream_carries_them_too(demo: Up) -> None:
    with demo.client.chat.completions.with_streaming_response.create(
        model=demo.model, messages=HELLO, max_tokens=4, stream=True
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-gridmill-node"] == demo.node_id
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["gridmill"] == {"nodes": [demo.node_id], "request_id": raw.headers["x-gridmill-request-id"]}


def test_the_fingerprint_is_stable_and_selects_the_class(demo: Up) -> None:
    fingerprint = chat(demo).system_fingerprint
    assert fingerprint == chat(demo, stream=False, temperature=1).system_fingerprint
    pinned = demo.client.chat.completions.create(
        model=f"{demo.model}@{fingerprint[:8]}", messages=HELLO, max_tokens=16, temperature=0
    )
    assert pinned.system_fingerprint == fingerprint
    assert said(pinned) == said(chat(demo))


@pytest.mark.parametrize(
    "parameters",
    [
        {"user": "ann"},
        {"metadata": {"purpose": "test"}},
        {"store": True},
        {"service_tier": "auto"},
        {"safety_identifier": "ann"},
        {"prompt_cache_key": "ann"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
    ],
    ids=str,
)
def test_what_is_accepted_without_effect_has_none(demo: Up, parameters: dict[str, Any]) -> None:
    assert said(chat(demo, **parameters)) == said(chat(demo))


# ---------------------------------------------------------------- refusals


def test_an_unknown_parameter_is_named(demo: Up) -> None:
    error = refused(demo, extra_body={"temprature": 1})
    assert error.param == "temprature" and "temperature" in error.message
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    "parameters",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "none"},
        {"response_format": {"type": "json_object"}},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
    ],
    ids=str,
)
def test_what_comes_later_is_refused_by_name(demo: Up, parameters: dict[str, Any]) -> None:
    error = refused(demo, **parameters)
    assert error.param == next(iter(parameters)) and "not supported yet" in error.message


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", -1),
        ("temperature", 1e300),
        ("top_p", 0),
        ("n", 0),
        ("n", 10**12),
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("seed", 2**70),
        ("stop", [""]),
        ("stop", 5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"999999999": 1}),
        ("top_logprobs", 5),
        ("presence_penalty", 50),
        ("stream", "yes"),
        ("user", 5),
    ],
    ids=str,
)
def test_wrong_types_and_absurd_numbers_are_refused_by_name(demo: Up, param: str, value: Any) -> None:
    assert refused(demo, extra_body={param: value}).param == param


def test_stream_options_without_a_stream_are_refused(demo: Up) -> None:
    assert refused(demo, stream_options={"include_usage": True}).param == "stream_options"


def test_the_two_token_limits_must_agree(demo: Up) -> None:
    assert refused(demo, max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "tool", "content": "x", "tool_call_id": "y"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "colour": "red"}], "messages[0].colour"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
    ],
    ids=["none", "image", "tool", "field", "null"],
)
def test_messages_that_cannot_be_read_are_refused_by_place(demo: Up, messages: Any, param: str) -> None:
    assert refused(demo, messages=messages).param == param


def test_an_unknown_model_is_not_found_and_the_nearest_is_offered(demo: Up) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        demo.client.chat.completions.create(model="gridmil/demo", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert demo.model in caught.value.message


def test_a_wrong_key_is_an_authentication_error(demo: Up) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        demo.client.with_options(api_key="gm-wrong").models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_prompt_too_long_is_refused_with_numbers(demo: Up) -> None:
    context = demo.client.models.retrieve(demo.model).model_extra["gridmill"]["context_tokens"]  # type: ignore[index]
    error = refused(demo, messages=[{"role": "user", "content": "node " * (context + 1)}])
    assert error.code == "context_length_exceeded" and str(context) in error.message


def test_an_error_before_the_stream_is_a_plain_error(demo: Up) -> None:
    assert refused(demo, stream=True, temperature=9).param == "temperature"


def test_a_body_over_the_limit_is_413(demo: Up) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(demo, messages=[{"role": "user", "content": "x" * (5 << 20)}])
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("body", "code"),
    [(b'{"model": "\xff"}', "invalid_utf8"), (b'{"model": ', "invalid_json"), (b"[" * 100_000, None), (b"[]", None)],
    ids=["utf8", "json", "deep", "list"],
)
def test_bytes_that_are_no_request_are_400(demo: Up, body: bytes, code: str | None) -> None:
    response = demo.http.post(f"{demo.base_url}/chat/completions", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert code in (None, error["code"])


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_numbers_that_json_does_not_have_are_named(demo: Up, number: str) -> None:
    body = json.dumps({"model": demo.model, "messages": HELLO})[:-1] + f', "temperature": {number}}}'
    response = demo.http.post(f"{demo.base_url}/chat/completions", content=body.encode())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_unknown_paths_and_wrong_methods_have_openais_shape(demo: Up) -> None:
    assert demo.http.get(f"{demo.base_url}/nothing").json()["error"]["code"] == "unknown_url"
    wrong = demo.http.get(f"{demo.base_url}/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


# ---------------------------------------------------------------- many at once, and callers that leave


def test_twenty_requests_at_once_each_get_their_own_answer(demo: Up) -> None:
    async def body() -> list[str]:
        async with demo.async_client() as client:
            answers = await asyncio.gather(
                *[
                    client.completions.create(
                        model=demo.model, prompt="Gridmill", max_tokens=12, temperature=2, seed=seed % 10
                    )
                    for seed in range(20)
                ]
            )
        return [answer.choices[0].text for answer in answers]

    answers = asyncio.run(body())
    assert answers[:10] == answers[10:]
    assert len(set(answers)) > 1


def test_a_caller_that_closes_its_stream_frees_the_node(slow_echo: Up) -> None:
    stream = chat(slow_echo, stream=True, max_tokens=200)
    next(iter(stream))
    assert slow_echo.works_running() == 1
    stream.close()
    until(lambda: slow_echo.works_running() == 0)
    assert chat(slow_echo, max_tokens=2).usage.completion_tokens == 2


def test_a_caller_whose_patience_ends_frees_the_node(slow_echo: Up) -> None:
    with pytest.raises(openai.APITimeoutError):
        slow_echo.client.with_options(timeout=0.5).chat.completions.create(
            model=slow_echo.model, messages=HELLO, max_tokens=200
        )
    until(lambda: slow_echo.works_running() == 0)


def test_a_cancelled_task_frees_the_node(slow_echo: Up) -> None:
    async def body() -> None:
        async with slow_echo.async_client() as client:
            stream = await client.chat.completions.create(
                model=slow_echo.model, messages=HELLO, max_tokens=200, n=3, stream=True
            )
            reading = asyncio.ensure_future(anext(aiter(stream)))
            await reading
            await stream.close()

    asyncio.run(body())
    until(lambda: slow_echo.works_running() == 0)


def test_tokens_arrive_one_by_one(slow_echo: Up) -> None:
    stream = iter(chat(slow_echo, stream=True, max_tokens=20))
    for _ in range(3):
        next(stream)
    assert slow_echo.works_running() == 1
    assert sum(1 for _ in stream) > 10
