"""The request parser: each range, each refusal by name, and that no bytes at all get past the typed error."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gridmill.network.gateway.requests import (
    ACCEPTED_WITHOUT_EFFECT,
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    ChatRequest,
    CompletionRequest,
    RequestError,
    parse_chat,
    parse_completion,
    parse_max_wait,
)
from gridmill.network.scheduler import ANYWHERE, Allowed

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**parameters: object) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **parameters}).encode())


def completion(**parameters: object) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello", **parameters}).encode())


def refused_chat(**parameters: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**parameters)
    return caught.value


def refused_body(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_chat(body)
    return caught.value


# ---------------------------------------------------------------- what is understood


def test_defaults_are_off() -> None:
    request = chat()
    assert (request.n, request.stream, request.max_tokens, request.seed, request.stop) == (1, False, None, None, ())
    sampling = request.sampling(bytes(32), 7)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.top_logprobs) == (1.0, 1.0, 0, None)
    assert sampling.max_tokens == 7


def test_every_sampling_parameter_reaches_the_sampling() -> None:
    request = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"7": -100, "3": 2.5},
        min_tokens=2,
        max_tokens=9,
        ignore_eos=True,
        stop_token_ids=[5, 4, 5],
        logprobs=True,
        top_logprobs=3,
    )
    sampling = request.sampling(b"s" * 32, 9)
    assert sampling.temperature == 0.5
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 40, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.0, 1.1)
    assert sampling.logit_bias == ((3, 2.5), (7, -100.0))
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (2, True, (4, 5))
    assert (sampling.top_logprobs, sampling.seed) == (3, b"s" * 32)


def test_null_means_absent_for_every_optional_parameter() -> None:
    absent = dict.fromkeys(set(CHAT_PARAMETERS) - {"model", "messages"})
    assert chat(**absent) == chat()


def test_what_is_accepted_without_effect_changes_nothing() -> None:
    values = {
        "user": "u-1",
        "metadata": {"a": "b"},
        "store": True,
        "safety_identifier": "s",
        "parallel_tool_calls": False,
    }
    assert values.keys() == ACCEPTED_WITHOUT_EFFECT.keys()
    assert chat(**values) == chat()
    assert completion(**values) == completion()


@pytest.mark.parametrize("name", sorted(ACCEPTED_WITHOUT_EFFECT))
def test_what_is_accepted_without_effect_is_still_typed(name: str) -> None:
    assert refused_chat(**{name: [1]}).param == name


def test_a_caller_says_which_nodes_may_have_its_request() -> None:
    assert chat().routing == chat(routing={}).routing == ANYWHERE
    assert chat(routing={"regions": ["eu", "us"], "trust": "invited"}).routing == Allowed(
        regions=frozenset({"eu", "us"}), tier=1
    )
    assert completion(routing={"owners": ["o"], "trust": "operator"}).routing == Allowed(frozenset({"o"}), tier=2)
    assert chat(prompt_cache_key="k").prompt_cache_key == "k"


@pytest.mark.parametrize(
    ("routing", "param"),
    [
        ("eu", "routing"),
        ({"region": ["eu"]}, "routing.region"),
        ({"regions": "eu"}, "routing.regions"),
        ({"regions": []}, "routing.regions"),
        ({"regions": ["eu", 5]}, "routing.regions[1]"),
        ({"owners": [""]}, "routing.owners[0]"),
        ({"owners": ["o"] * 65}, "routing.owners"),
        ({"trust": "some"}, "routing.trust"),
        ({"trust": ["any"]}, "routing.trust"),
    ],
)
def test_a_choice_of_nodes_that_cannot_be_read_is_refused_by_its_name(routing: object, param: str) -> None:
    assert refused_chat(routing=routing).param == param


def test_a_service_tier_is_default_or_flex_and_auto_means_default() -> None:
    assert [chat(service_tier=tier).service_tier for tier in ("auto", "default", "flex")] == [
        "default",
        "default",
        "flex",
    ]
    assert completion(service_tier="flex").service_tier == "flex"
    assert chat().service_tier is None, "who did not ask is not told"


@pytest.mark.parametrize(("raw", "seconds"), [(None, None), (b"0", 0.0), (b"2.5", 2.5), (b"600", 600.0)])
def test_a_caller_says_in_seconds_how_long_it_waits_for_a_place(raw: bytes | None, seconds: float | None) -> None:
    assert parse_max_wait(raw) == seconds


@pytest.mark.parametrize("raw", [b"", b"-1", b"nan", b"inf", b"1e3", b"5s", b"1_0", b" 1", "٣".encode(), b"9" * 400])
def test_a_wait_that_is_no_number_of_seconds_is_refused_with_the_header_s_name(raw: bytes) -> None:
    with pytest.raises(RequestError, match="x-gridmill-max-wait-seconds"):
        parse_max_wait(raw)


def test_both_names_of_the_token_limit_work_and_must_agree() -> None:
    assert chat(max_completion_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).max_tokens == 5
    assert refused_chat(max_completion_tokens=5, max_tokens=6).param == "max_completion_tokens"


def test_chat_logprobs_is_a_switch_and_top_logprobs_needs_it() -> None:
    assert chat(logprobs=True).top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).top_logprobs == 20
    assert chat(logprobs=False).top_logprobs is None
    assert refused_chat(top_logprobs=2).param == "top_logprobs"
    assert refused_chat(logprobs=2).param == "logprobs"
    assert refused_chat(logprobs=True, top_logprobs=21).param == "top_logprobs"


def test_completion_logprobs_is_a_number() -> None:
    assert completion(logprobs=0).top_logprobs == 0
    assert completion(logprobs=5).top_logprobs == 5
    with pytest.raises(RequestError, match="logprobs must be an integer"):
        completion(logprobs=True)


def test_stop_is_a_string_or_up_to_sixteen_of_them() -> None:
    assert chat(stop="END").stop == ("END",)
    assert chat(stop=["a", "b", "a"]).stop == ("a", "b")
    assert len(chat(stop=[str(i) for i in range(16)]).stop) == 16
    for bad in ("", [""], [str(i) for i in range(17)], ["x" * 257], [1], {"a": 1}):
        assert refused_chat(stop=bad).param == "stop"


def test_stream_options_need_a_stream_and_know_one_option() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={}).include_usage
    assert refused_chat(stream_options={"include_usage": True}).param == "stream_options"
    assert refused_chat(stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    assert refused_chat(stream=True, stream_options={"other": 1}).param == "stream_options.other"


def test_a_prompt_is_text_or_ids_or_a_list_of_either() -> None:
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[1, 2]).prompts == ((1, 2),)
    assert completion(prompt=[[1], [2, 3]]).prompts == ((1,), (2, 3))


@pytest.mark.parametrize(
    "bad", [[], [[]], ["a", 1], [1, "a"], [1, True], [True], [-1], [1.5], [2**32], [[1], "a"], {}, 5, [None], [[1], []]]
)
def test_a_prompt_that_is_none_of_these_is_refused(bad: object) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=bad)
    assert caught.value.param == "prompt"


def test_one_request_is_at_most_sixty_four_works() -> None:
    assert len(completion(prompt=["a"] * 64).prompts) == 64
    for bad in ({"prompt": ["a"] * 65}, {"prompt": ["a"] * 5, "n": 16}):
        with pytest.raises(RequestError) as caught:
            completion(**bad)
        assert caught.value.param == "prompt"


# ---------------------------------------------------------------- messages


def test_text_parts_are_joined_and_developer_is_system() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
                "name": "Ann",
            },
        ]
    )
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello", "name": "Ann"},
    )


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[*HELLO, answer, *HELLO]).messages[1] == {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[0]"),
        ({}, "messages[0].role"),
        ({"role": "king", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}, "messages[0].content[0].more"),
        ({"role": "user", "content": "x", "wieght": 1}, "messages[0].wieght"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
    ],
)
def test_a_bad_message_is_named_by_its_place_and_field(message: object, param: str) -> None:
    assert refused_chat(messages=[message]).param == param


@pytest.mark.parametrize("bad", [[], {}, "hi", 3, [HELLO[0]] * 2049])
def test_messages_must_be_a_list_of_some(bad: object) -> None:
    assert refused_chat(messages=bad).param == "messages"


# ---------------------------------------------------------------- what is refused, by name


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model", 5),
        ("model", ""),
        ("n", 0),
        ("n", 17),
        ("n", 1.0),
        ("n", True),
        ("n", "2"),
        ("stream", "yes"),
        ("stream", 1),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 10**30),
        ("max_tokens", "many"),
        ("max_completion_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -0.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"4294967296": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("min_tokens", -1),
        ("ignore_eos", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("stop_token_ids", list(range(65))),
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("response_format", {"type": "json_object"}),
        ("response_format", "text"),
        ("service_tier", "priority"),
        ("service_tier", 1),
        ("metadata", {"a": 1}),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name_on_both_endpoints(name: str, bad: object) -> None:
    error = refused_chat(**{name: bad})
    assert error.param == name
    assert name in error.message
    with pytest.raises(RequestError) as caught:
        completion(**{name: bad})
    assert caught.value.param == name


def test_a_range_error_says_what_is_allowed_and_what_came() -> None:
    assert refused_chat(temperature=7).message == "temperature must be a number between 0 and 2, not 7"


def test_min_tokens_above_max_tokens_is_refused() -> None:
    assert refused_chat(min_tokens=6, max_tokens=5).param == "min_tokens"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 5000])
@pytest.mark.parametrize("name", ["temperature", "max_tokens", "seed", "top_p", "logit_bias"])
def test_a_number_that_is_none_is_named_too(name: str, number: str) -> None:
    value = f'{{"5": {number}}}' if name == "logit_bias" else number
    error = refused_body(f'{{"model": "m", "messages": {json.dumps(HELLO)}, "{name}": {value}}}'.encode())
    assert error.param == name


@pytest.mark.parametrize(
    "name",
    ["tools", "tool_choice", "functions", "audio", "modalities", "best_of", "suffix", "echo", "reasoning_effort"],
)
def test_what_comes_later_says_so(name: str) -> None:
    error = refused_chat(**{name: "x"})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert "not supported yet" in error.message


def test_an_unknown_parameter_is_named_with_its_nearest_neighbour() -> None:
    error = refused_chat(temprature=1)
    assert error.param == "temprature"
    assert "did you mean temperature" in error.message


def test_the_other_endpoints_prompt_is_pointed_to_its_place() -> None:
    assert "/v1/completions" in refused_chat(prompt="x").message
    with pytest.raises(RequestError, match="/v1/chat/completions"):
        completion(messages=HELLO)


def test_a_hostile_parameter_name_comes_back_clipped() -> None:
    error = refused_chat(**{"x" * 100_000: 1})
    assert len(error.message) < 300
    assert len(error.param or "") < 100


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_requirement_is_named(missing: str) -> None:
    body = {"model": "m", "messages": HELLO}
    del body[missing]
    assert refused_body(json.dumps(body).encode()).param == missing


# ---------------------------------------------------------------- bytes


def test_a_body_that_is_no_json_says_where() -> None:
    assert "byte 10" in refused_body(b'{"model": x}').message
    assert refused_body(b"").code == "invalid_json"


def test_a_body_that_is_no_utf8_says_where() -> None:
    error = refused_body(b'{"model": "\xff"}')
    assert error.code == "invalid_utf8"
    assert "byte 11" in error.message
    assert refused_body(b"\xff\xfe{}").code == "invalid_utf8"


def test_half_a_surrogate_pair_is_refused() -> None:
    assert refused_body(b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}').code == "invalid_json"
    assert refused_body(b'{"\\ud800": 1}').message.isascii()


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 100_000, b"[1]", b"null", b'"x"', b"3"])
def test_a_body_of_the_wrong_shape_is_an_error_and_not_a_crash(body: bytes) -> None:
    refused_body(body)


def test_duplicate_keys_are_no_reason_to_refuse() -> None:
    assert parse_chat(b'{"model":"a","model":"b","messages":[{"role":"user","content":"x"}]}').model == "b"


# ---------------------------------------------------------------- anything at all

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "text", "auto", 10**400, -(2**63)])
)
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "1", "x"]) | st.text(max_size=5), inner, max_size=4
        )
    ),
    max_leaves=12,
)
_names = st.sampled_from(sorted({*CHAT_PARAMETERS, *COMPLETION_PARAMETERS})) | st.text(max_size=12)


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(_names, _values, max_size=6), st.booleans())
def test_any_json_object_is_a_request_or_a_request_error(extra: dict[str, object], usable: bool) -> None:
    whole = {"model": "m", "messages": HELLO, "prompt": "x", **extra} if usable else extra
    for parse, foreign in ((parse_chat, "prompt"), (parse_completion, "messages")):
        body = json.dumps({key: value for key, value in whole.items() if key != foreign}).encode()
        try:
            request = parse(body)
        except RequestError as error:
            assert len(error.message) < 1000
            assert error.message.encode()
            assert (error.param or "-").encode()
        else:
            assert 1 <= request.n <= 16
            assert request.sampling(bytes(32), request.max_tokens or 1)


@settings(max_examples=600, deadline=None)
@given(
    st.binary(max_size=8),
    st.integers(min_value=0, max_value=400),
    st.integers(min_value=0, max_value=40),
)
@example(b"\xed\xa0\x80", 30, 0)
@example(b'"\\ud800"', 9, 3)
def test_any_damage_to_a_good_body_is_survived(damage: bytes, at: int, removed: int) -> None:
    good = json.dumps(
        {"model": "m", "messages": HELLO, "temperature": 1e0, "logit_bias": {"5": -1.5}, "stop": ["é", "\U0001f600"]}
    ).encode()
    body = good[:at] + damage + good[at + removed :]
    for parse in (parse_chat, parse_completion):
        try:
            parse(body)
        except RequestError as error:
            assert error.message.encode()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_survived(body: bytes) -> None:
    try:
        parse_chat(body)
    except RequestError as error:
        assert error.message.encode()
