"""OpenAI's request bodies: bytes in, a validated request out, or a RequestError that names the parameter.

- Pure: no clock, no socket, no model. Whatever the bytes are, the outcome is a request or a RequestError.
- Each parameter has one line in a table. What is not in a table is refused with the nearest name that is; `null` means
  absent, as it does for OpenAI.
- What depends on the class (vocabulary, context) is checked later, by `wire.sampling.problem_with`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import msgspec

from gridmill.network.registry import TIER_INVITED, TIER_OWN
from gridmill.network.scheduler import ANYWHERE, Allowed
from gridmill.wire.codec import PRICE_NANOCREDITS_MAX
from gridmill.wire.messages import Price
from gridmill.wire.sampling import LOGIT_BIAS_ENTRIES_MAX, STOP_TOKEN_IDS_MAX, TOP_LOGPROBS_MAX, Sampling

CHOICES_MAX = 16  # `n`; each is a Work of its own
WORKS_MAX = 64  # choices × prompts of one request: a whole node's default places, so that one request fills one at most
MESSAGES_MAX = 2048  # as OpenAI; a template is run over all of them
STOP_STRINGS_MAX = 16  # OpenAI allows 4
STOP_CHARACTERS_MAX = 256  # also how much text may be held back while a stop string could still be completing
MODEL_CHARACTERS_MAX = 256
LABEL_CHARACTERS_MAX = 512  # `user`, `cache_salt`, message names: identifiers, not content
ROUTING_LABELS_MAX = 64
TRUST = {"any": 0, "invited": TIER_INVITED, "operator": TIER_OWN}
METADATA_ENTRIES_MAX = 64  # OpenAI allows 16
TOKENS_MAX = 1 << 24  # no class may have a longer context (wire.classes.parse_facts)
TOKEN_ID_MAX = (1 << 32) - 1  # ids travel as uint32
SEED_MIN, SEED_MAX = -(1 << 63), (1 << 63) - 1
BLAME_BYTES_MAX = 256 << 10  # above this a body with a broken number gets a position instead of a name
NAME_SHOWN_CHARACTERS = 64
MAX_WAIT_HEADER = b"x-gridmill-max-wait-seconds"
NOT_UTF8_JSON = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # RFC 8259 §8.1: UTF-8, and no mark


ServiceTier = Literal["default", "flex"]


class RequestError(Exception):
    """The caller's mistake (400). `param` is the parameter at fault, or None when the body as a whole is."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints share. Fields are the parameters of the same name; None means not given."""

    model: str
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    cache_salt: str | None = None
    max_price: Price | None = None
    routing: Allowed = ANYWHERE
    prompt_cache_key: str | None = None
    top_logprobs: int | None = None  # as in Sampling: None reports none, 0 only the chosen ids'
    service_tier: ServiceTier | None = None

    def sampling(self, seed: bytes, max_tokens: int) -> Sampling:
        """The parameters as they travel; `seed` is S_i of the sampler page."""
        return Sampling(
            seed=seed,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            top_logprobs=self.top_logprobs,
        )


class ChatRequest(_Request, frozen=True, kw_only=True):
    """`messages` as a chat template takes them: role, content (one string), and name where one was given."""

    messages: tuple[dict[str, str], ...]


class CompletionRequest(_Request, frozen=True, kw_only=True):
    """`prompts`: each a text or token ids. Choice `p * n + j` is choice j of prompt p."""

    prompts: tuple[str | tuple[int, ...], ...]


def parse_chat(body: bytes) -> ChatRequest:
    """The body of POST /v1/chat/completions. Raises RequestError."""
    fields = _read(body, CHAT_PARAMETERS)
    for required in ("model", "messages"):
        if required not in fields:
            raise RequestError(f"{required} is required", required)
    wanted = fields.pop("logprobs", False)
    if "top_logprobs" in fields and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    if wanted:
        fields.setdefault("top_logprobs", 0)
    _reconcile(fields)
    return ChatRequest(**fields)


def parse_completion(body: bytes) -> CompletionRequest:
    """The body of POST /v1/completions. Raises RequestError."""
    fields = _read(body, COMPLETION_PARAMETERS)
    for required in ("model", "prompt"):
        if required not in fields:
            raise RequestError(f"{required} is required", required)
    fields["prompts"] = fields.pop("prompt")
    if "logprobs" in fields:
        fields["top_logprobs"] = fields.pop("logprobs")
    _reconcile(fields)
    request = CompletionRequest(**fields)
    if request.n * len(request.prompts) > WORKS_MAX:
        raise RequestError(f"n times the number of prompts must be at most {WORKS_MAX}", "prompt")
    return request


def parse_max_wait(raw: bytes | None) -> float | None:
    """Seconds that this caller waits for a place at most, from the header of that name. Raises RequestError."""
    if raw is None:
        return None
    if not _SECONDS.fullmatch(raw):
        raise RequestError(
            f"{MAX_WAIT_HEADER.decode()} must be a number of seconds like 2.5, and says how long this request may wait "
            "for a free place"
        )
    return float(raw)


def _reconcile(fields: dict[str, Any]) -> None:
    """Rules over more than one parameter."""
    for ignored in ACCEPTED_WITHOUT_EFFECT:
        fields.pop(ignored, None)
    fields.pop("response_format", None)
    newer = fields.pop("max_completion_tokens", None)
    if newer is not None and fields.setdefault("max_tokens", newer) != newer:
        raise RequestError(
            "max_tokens and max_completion_tokens mean the same and must agree: send one of them",
            "max_completion_tokens",
        )
    if "stream_options" in fields:
        if not fields.get("stream"):
            raise RequestError("stream_options is only allowed when stream is true", "stream_options")
        fields["include_usage"] = fields.pop("stream_options")
    if fields.get("min_tokens", 0) > fields.get("max_tokens", TOKENS_MAX):
        raise RequestError(f"min_tokens must be between 0 and max_tokens, {fields['max_tokens']}", "min_tokens")


# ---------------------------------------------------------------- JSON


def _read(body: bytes, table: Mapping[str, Reader]) -> dict[str, Any]:
    if body.startswith(NOT_UTF8_JSON) or b"\0" in body[:2]:
        raise RequestError(
            "the body is not UTF-8 JSON: it begins with a byte order mark or is UTF-16 or UTF-32", code="invalid_utf8"
        )
    try:
        decoded = _decode(body)
    except RequestError:
        # JSON has no NaN and no 1e999, but the caller is helped by the parameter's name rather than by a position.
        blamed = _decode_leniently(body)
        if isinstance(blamed, dict):
            _read_fields(blamed, table)
            raise RequestError(
                "the body is not valid JSON: it holds an unescaped control character or half a surrogate pair",
                code="invalid_json",
            ) from None
        raise
    if not isinstance(decoded, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(decoded)}")
    return _read_fields(decoded, table)


def _read_fields(decoded: dict[str, Any], table: Mapping[str, Reader]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in decoded.items():
        reader = table.get(name)
        if reader is None:
            _refuse_unknown(name, table)
        if value is not None:
            fields[name] = reader(name, value)
    return fields


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise RequestError("the body is nested too deeply: a few levels are all that any parameter needs") from None
    except UnicodeDecodeError:
        raise RequestError(f"the body is not valid UTF-8{_utf8_position(body)}", code="invalid_utf8") from None
    except msgspec.DecodeError as error:
        position = _utf8_position(body)
        if position:
            raise RequestError(f"the body is not valid UTF-8{position}", code="invalid_utf8") from None
        reason = str(error)
        if "byte" not in reason:
            # Cut off, half a surrogate pair, or a number out of range: msgspec does not say where.
            reason = f"{reason} (somewhere in its {len(body)} bytes)"
        raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from None


def _utf8_position(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f" (byte {error.start})"
    return ""


def _decode_leniently(body: bytes) -> Any:
    """The body as Python reads it (NaN, infinities, numbers of any length); None when that fails too."""
    if len(body) > BLAME_BYTES_MAX:
        return None
    try:
        return json.loads(body, parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf)
    except (ValueError, RecursionError):
        return None


def _refuse_unknown(name: str, table: Mapping[str, Reader]) -> NoReturn:
    shown = _clip(name)
    if (table is CHAT_PARAMETERS and name == "prompt") or (table is COMPLETION_PARAMETERS and name == "messages"):
        place = "/v1/completions" if name == "prompt" else "/v1/chat/completions"
        raise RequestError(
            f"{name} is no parameter of this endpoint; it belongs to {place}", shown, "unknown_parameter"
        )
    nearest = difflib.get_close_matches(name[:NAME_SHOWN_CHARACTERS], table, n=1, cutoff=0.6)
    hint = f": did you mean {nearest[0]}?" if nearest else ""
    raise RequestError(f"unknown parameter '{shown}'{hint}", shown, "unknown_parameter")


# ---------------------------------------------------------------- readers: (name, value) → validated value

Reader = Callable[[str, Any], Any]


def _number(low: float, high: float, *, low_excluded: bool = False) -> Reader:
    allowed = f"above {low:g} and at most {high:g}" if low_excluded else f"between {low:g} and {high:g}"

    def read(name: str, value: Any) -> float:
        # `type` rather than isinstance: to Python a bool is an int, to a caller it is a mistake. NaN fails comparisons.
        if type(value) not in (int, float) or not low <= value <= high or (low_excluded and value == low):
            raise RequestError(f"{name} must be a number {allowed}, not {_shown(value)}", name)
        return float(value)

    return read


def _integer(low: int, high: int) -> Reader:
    def read(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise RequestError(f"{name} must be an integer between {low} and {high}, not {_shown(value)}", name)
        return value

    return read


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise RequestError(f"{name} must be true or false, not {_shown(value)}", name)
    return value


def _text(characters_max: int, characters_min: int = 1) -> Reader:
    allowed = f"a string of {characters_min} to {characters_max} characters"

    def read(name: str, value: Any) -> str:
        if type(value) is not str or not characters_min <= len(value) <= characters_max:
            raise RequestError(f"{name} must be {allowed}, not {_shown(value)}", name)
        return value

    return read


def _stop(name: str, value: Any) -> tuple[str, ...]:
    strings = [value] if type(value) is str else value
    if type(strings) is not list or len(strings) > STOP_STRINGS_MAX:
        raise RequestError(f"{name} must be a string or a list of up to {STOP_STRINGS_MAX}, not {_shown(value)}", name)
    for string in strings:
        if type(string) is not str or not 0 < len(string) <= STOP_CHARACTERS_MAX:
            raise RequestError(
                f"each string in {name} must have 1 to {STOP_CHARACTERS_MAX} characters, not {_shown(string)}", name
            )
    return tuple(dict.fromkeys(strings))


_SECONDS = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if type(value) is not dict or len(value) > LOGIT_BIAS_ENTRIES_MAX:
        raise RequestError(
            f"{name} must be an object of up to {LOGIT_BIAS_ENTRIES_MAX} token ids with biases, not {_shown(value)}",
            name,
        )
    biases = []
    for key, bias in value.items():
        if not _TOKEN_ID.fullmatch(key) or int(key) > TOKEN_ID_MAX:
            raise RequestError(f"the keys of {name} must be token ids as strings, not '{_clip(key)}'", name)
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise RequestError(f"{name} of token {key} must be a number between -100 and 100, not {_shown(bias)}", name)
        biases.append((int(key), float(bias)))
    return tuple(sorted(biases))


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if type(value) is not list or not all(type(i) is int and 0 <= i <= TOKEN_ID_MAX for i in value):
        raise RequestError(f"{name} must be a list of token ids (integers from 0)", name)
    return tuple(value)


def _stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _token_ids(name, value)
    if len(ids) > STOP_TOKEN_IDS_MAX:
        raise RequestError(f"{name} must hold at most {STOP_TOKEN_IDS_MAX} ids, not {len(ids)}", name)
    return tuple(sorted(set(ids)))


def _stream_options(name: str, value: Any) -> bool:
    if type(value) is not dict:
        raise RequestError(f"{name} must be an object, not {_shown(value)}", name)
    for key in value:
        if key != "include_usage":
            raise RequestError(f"unknown parameter '{name}.{_clip(key)}'", f"{name}.{_clip(key)}", "unknown_parameter")
    wanted = value.get("include_usage")
    return _boolean(f"{name}.include_usage", wanted) if wanted is not None else False


def _metadata(name: str, value: Any) -> None:
    if type(value) is not dict or len(value) > METADATA_ENTRIES_MAX:
        raise RequestError(
            f"{name} must be an object of up to {METADATA_ENTRIES_MAX} strings, not {_shown(value)}", name
        )
    if not all(type(entry) is str for entry in value.values()):
        raise RequestError(f"the values of {name} must be strings", name)


def _service_tier(name: str, value: Any) -> ServiceTier:
    if type(value) is not str or value not in ("auto", "default", "flex"):
        raise RequestError(
            f"{name} must be 'auto', 'default' or 'flex' (waits longer, and gives way to others), not {_shown(value)}",
            name,
        )
    return "flex" if value == "flex" else "default"


def _not_yet(name: str, value: Any) -> NoReturn:
    raise RequestError(f"{name} is not supported yet: leave it out", name, "unsupported_parameter")


def _response_format(name: str, value: Any) -> None:
    if value != {"type": "text"}:
        raise RequestError(f"{name} other than text is not supported yet: leave it out", name, "unsupported_parameter")


def _max_price(name: str, value: Any) -> Price:
    """What the caller pays per token at most, the network's fee included: one number for all, or one each."""
    price = _integer(0, PRICE_NANOCREDITS_MAX)
    if type(value) is not dict:
        most = price(name, value)
        return Price(most, most, most)
    for key in value:
        if key not in ("input", "output"):
            raise RequestError(f"unknown parameter '{name}.{_clip(key)}'", f"{name}.{_clip(key)}", "unknown_parameter")
    read = {
        key: PRICE_NANOCREDITS_MAX if value.get(key) is None else price(f"{name}.{key}", value[key])
        for key in ("input", "output")
    }
    return Price(read["input"], read["input"], read["output"])


def _routing(name: str, value: Any) -> Allowed:
    """Which nodes may have this request: of these owners, in these regions, trusted at least so much."""
    if type(value) is not dict:
        raise RequestError(f"{name} must be an object with owners, regions or trust, not {_shown(value)}", name)
    for key in value:
        if key not in ("owners", "regions", "trust"):
            raise RequestError(f"unknown parameter '{name}.{_clip(key)}'", f"{name}.{_clip(key)}", "unknown_parameter")
    trust = value.get("trust")
    if trust is not None and (type(trust) is not str or trust not in TRUST):
        allowed = ", ".join(TRUST)
        raise RequestError(f"{name}.trust must be one of {allowed}, not {_shown(trust)}", f"{name}.trust")
    words = {
        key: None if value.get(key) is None else _labels(f"{name}.{key}", value[key]) for key in ("owners", "regions")
    }
    return Allowed(words["owners"], words["regions"], TRUST[trust or "any"])


def _labels(name: str, value: Any) -> frozenset[str]:
    each = _text(LABEL_CHARACTERS_MAX)
    if type(value) is not list or not 1 <= len(value) <= ROUTING_LABELS_MAX:
        raise RequestError(f"{name} must be a list of 1 to {ROUTING_LABELS_MAX} strings, not {_shown(value)}", name)
    return frozenset(each(f"{name}[{index}]", one) for index, one in enumerate(value))


def _prompt(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    if type(value) is str:
        return (value,)
    if type(value) is list and value:
        first = type(value[0])
        if first is int:
            return (_token_ids(name, value),)
        if len(value) > WORKS_MAX:
            raise RequestError(f"{name} must hold at most {WORKS_MAX} prompts, not {len(value)}", name)
        if first is str and all(type(one) is str for one in value):
            return tuple(value)
        if first is list and all(value):
            return tuple(_token_ids(name, one) for one in value)
    raise RequestError(
        f"{name} must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty",
        name,
    )


# ---------------------------------------------------------------- messages

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What clients send back when they append an answer to the conversation as they got it: harmless while empty.
_MESSAGE_EMPTY_FIELDS = frozenset({"refusal", "tool_calls", "function_call", "audio", "annotations", "tool_call_id"})


def _messages(name: str, value: Any) -> tuple[dict[str, str], ...]:
    if type(value) is not list or not value:
        raise RequestError(f"{name} must be a list of at least one message", name)
    if len(value) > MESSAGES_MAX:
        raise RequestError(f"{name} must hold at most {MESSAGES_MAX} messages, not {len(value)}", name)
    return tuple(_message(f"{name}[{index}]", message) for index, message in enumerate(value))


def _message(path: str, message: Any) -> dict[str, str]:
    if type(message) is not dict:
        raise RequestError(f"{path} must be an object with role and content, not {_shown(message)}", path)
    role = message.get("role")
    if role in ("tool", "function"):
        raise RequestError(f"{path}.role '{role}' is not supported yet: tools come later", f"{path}.role")
    if type(role) is not str or role not in _ROLES:
        raise RequestError(
            f"{path}.role must be system, developer, user or assistant, not {_shown(role)}", f"{path}.role"
        )
    read = {"role": _ROLES[role], "content": _content(f"{path}.content", message.get("content"))}
    for field, value in message.items():
        if field in ("role", "content"):
            continue
        shown = f"{path}.{_clip(field)}"
        if field == "name":
            if value is not None:
                read["name"] = _text(LABEL_CHARACTERS_MAX)(shown, value)
        elif field in _MESSAGE_EMPTY_FIELDS:
            if value is not None and value != []:
                raise RequestError(f"{shown} is not supported yet", shown, "unsupported_parameter")
        else:
            raise RequestError(f"unknown parameter '{shown}'", shown, "unknown_parameter")
    return read


def _content(path: str, content: Any) -> str:
    if type(content) is str:
        return content
    if type(content) is not list or not content:
        raise RequestError(f"{path} must be a string or a list of text parts, not {_shown(content)}", path)
    return "".join([_part(f"{path}[{index}]", part) for index, part in enumerate(content)])


def _part(path: str, part: Any) -> str:
    if type(part) is not dict:
        raise RequestError(f'{path} must be a part like {{"type": "text", "text": "…"}}, not {_shown(part)}', path)
    kind = part.get("type")
    if kind != "text":
        known = kind if type(kind) is str and kind.isidentifier() else _shown(kind)
        raise RequestError(
            f"{path}.type must be text: parts of type {_clip(known)} are not supported",
            f"{path}.type",
            "unsupported_part",
        )
    for field in part:
        if field not in ("type", "text"):
            raise RequestError(
                f"unknown parameter '{path}.{_clip(field)}'", f"{path}.{_clip(field)}", "unknown_parameter"
            )
    text = part.get("text")
    if type(text) is not str:
        raise RequestError(f"{path}.text must be a string, not {_shown(text)}", f"{path}.text")
    return text


# ---------------------------------------------------------------- the tables

# Typed and then dropped.
ACCEPTED_WITHOUT_EFFECT: Mapping[str, Reader] = {
    "user": _text(LABEL_CHARACTERS_MAX, characters_min=0),
    "metadata": _metadata,
    "store": _boolean,
    "safety_identifier": _text(LABEL_CHARACTERS_MAX, characters_min=0),
    "parallel_tool_calls": _boolean,
}

_NOT_YET = (
    *("tools", "tool_choice", "functions", "function_call", "modalities", "audio", "prediction", "reasoning_effort"),
    *("verbosity", "web_search_options", "best_of", "suffix", "echo", "moderation", "prompt_cache_retention"),
)

_SHARED: Mapping[str, Reader] = {
    "model": _text(MODEL_CHARACTERS_MAX),
    "stream": _boolean,
    "stream_options": _stream_options,
    "n": _integer(1, CHOICES_MAX),
    "max_tokens": _integer(1, TOKENS_MAX),
    "max_completion_tokens": _integer(1, TOKENS_MAX),
    "temperature": _number(0, 2),  # the sampler takes up to 100; OpenAI's clients know 2 as the limit
    "top_p": _number(0, 1, low_excluded=True),
    "top_k": _integer(0, TOKENS_MAX),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "logit_bias": _logit_bias,
    "seed": _integer(SEED_MIN, SEED_MAX),
    "stop": _stop,
    "min_tokens": _integer(0, TOKENS_MAX),
    "ignore_eos": _boolean,
    "stop_token_ids": _stop_token_ids,
    "cache_salt": _text(LABEL_CHARACTERS_MAX),
    "max_price": _max_price,
    "routing": _routing,
    "prompt_cache_key": _text(LABEL_CHARACTERS_MAX, characters_min=0),
    "service_tier": _service_tier,
    "response_format": _response_format,
    **ACCEPTED_WITHOUT_EFFECT,
    **dict.fromkeys(_NOT_YET, _not_yet),
}

CHAT_PARAMETERS: Mapping[str, Reader] = {
    **_SHARED,
    "messages": _messages,
    "logprobs": _boolean,
    "top_logprobs": _integer(0, TOP_LOGPROBS_MAX),
}

COMPLETION_PARAMETERS: Mapping[str, Reader] = {
    **_SHARED,
    "prompt": _prompt,
    "logprobs": _integer(0, TOP_LOGPROBS_MAX),  # OpenAI allows 5
}


# ---------------------------------------------------------------- showing hostile values


def _kind(value: Any) -> str:
    kinds: tuple[tuple[type, str], ...] = (
        (type(None), "null"),
        (bool, "a boolean"),
        (int, "a number"),
        (float, "a number"),
        (str, "a string"),
        (list, "a list"),
    )
    return next((words for kind, words in kinds if type(value) is kind), "an object")


def _shown(value: Any) -> str:
    """The value itself where that is short and says something, else what kind of thing it is."""
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is float or (type(value) is int and value.bit_length() <= 80):
        return str(value)
    if type(value) is int:
        return "a number of over 24 digits"
    if type(value) is str and len(value) <= 40 and value.isascii() and value.isprintable():
        return f"'{value}'"
    if type(value) is str:
        return f"a string of {len(value)} characters"
    if type(value) is list:
        return f"a list of {len(value)}"
    return _kind(value)


def _clip(name: str) -> str:
    """A name that a caller made up, short and printable enough to be sent back."""
    clipped = name if len(name) <= NAME_SHOWN_CHARACTERS else name[:NAME_SHOWN_CHARACTERS] + "…"
    return clipped.encode("utf-8", "replace").decode()
