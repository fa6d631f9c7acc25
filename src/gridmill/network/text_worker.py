"""The child process that runs tokenizers and chat templates of strangers: `python -m gridmill.network.text_worker`.

Three rules. Before the first stranger's byte arrives, everything it may need is imported and the process has given up
opening files, sockets and processes. Every call runs under an alarm whose default action is death, so that no loop can
outlive its limit, nor the network that asked. What goes wrong within a call is answered; memory exhaustion is death.

Resource limits are POSIX; the address-space limit is not enforced by macOS.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
from array import array
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from gridmill.network.detokenise import ClassText, TextStream
from gridmill.network.text_messages import (
    DETAIL_CHARACTERS_MAX,
    EXIT_MEMORY,
    REQUEST_HEADER,
    TABLE_PAGE_IDS,
    Encode,
    EncodeChat,
    Ids,
    Load,
    Loaded,
    Problem,
    Ready,
    Reply,
    Request,
    Table,
    reply_frame,
)
from gridmill.wire.classes import TextFacts, parse_facts

RENDERED_CHARACTERS_MAX = 8 << 20  # a context of two million tokens at four characters each
TOKEN_BYTES_MAX = 16 << 10  # the longest entries in public vocabularies are runs of a few hundred spaces
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first is the one that templates read
VERIFIED_SEQUENCES = 300
VERIFIED_LENGTH_IDS = 24
VERIFIED_TEXTS = (
    "Hello, world!",
    "  two  spaces   three\n\n\ttabs ",
    "It's 3.14 , isn't it ? (Yes.)",
    "naïve Ærøskøbing — “quotes” …",
    "Привет, мир. Γειά σου. こんにちは世界。안녕하세요",
    "🙂👩‍👩‍👧‍👦🇩🇰 zero‍joiner",
    "def f(x):\n    return x**2  # ▁ underscore ## hash </w>",
)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Refused(Exception):
    """A call that cannot be answered, with one of the codes of `text.TextError`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def main(memory_bytes: int) -> None:
    """Serves requests on stdin until it closes; each says how many seconds it may take."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _die_with_parent()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but frames may reach the pipe
    _warm_up()
    _give_up_the_outside()
    sink.write(reply_frame(Ready()))
    sink.flush()
    classes: dict[str, LoadedClass] = {}
    decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
    while (arrived := _read_request(source)) is not None:
        body, seconds = arrived
        _start_clock(seconds)
        try:
            answer = reply_frame(_answer(decoder, body, classes))
        except MemoryError:
            os._exit(EXIT_MEMORY)  # whatever ran out is in no state to go on
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        sink.write(answer)
        sink.flush()


def _answer(decoder: msgspec.msgpack.Decoder[Request], body: bytes, classes: dict[str, LoadedClass]) -> Reply:
    try:
        match decoder.decode(body):
            case Load() as load:
                for class_id in classes.keys() - set(load.keep):
                    del classes[class_id]
                loaded = classes[load.class_id] = LoadedClass(load.tokenizer, load.facts)
                return describe(loaded, load.tokenizer) if load.describe else Loaded()
            case EncodeChat() as chat:
                return Ids(classes[chat.class_id].encode_chat(chat))
            case Encode() as plain:
                return Ids(classes[plain.class_id].encode(plain.text, plain.add_special_tokens))
    except Refused as refusal:
        return Problem(refusal.code, refusal.detail[:DETAIL_CHARACTERS_MAX])
    except (msgspec.DecodeError, RecursionError) as error:
        return Problem("messages_invalid", f"the messages are no list of JSON objects: {error}"[:DETAIL_CHARACTERS_MAX])


class LoadedClass:
    """One tokenizer and its compiled chat template. Raises Refused on files that make no sense."""

    def __init__(self, tokenizer: bytes, facts: bytes) -> None:
        try:
            self.facts: TextFacts = parse_facts(facts)
        except ValueError as error:
            raise Refused("facts_invalid", f"the text facts make no sense: {error}") from error
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer)
            # As transformers does for chats: limits written in the file are for training, not for serving.
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        except MemoryError:
            raise
        except Exception as error:  # the library raises plain Exception, and a stranger's file any of them
            raise Refused("tokenizer_invalid", f"tokenizer.json cannot be loaded: {error}") from error
        self.template = ChatTemplate(self.facts.chat_template) if self.facts.chat_template else None

    def encode_chat(self, request: EncodeChat) -> bytes:
        if self.template is None:
            raise Refused("template_missing", "this model has no chat template")
        text = self.template.render(
            request.messages,
            request.tools,
            request.add_generation_prompt,
            self.facts.special_tokens,
            request.now_seconds,
        )
        return self.encode(text, add_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool) -> bytes:
        try:
            # The batch call skips the offsets that nobody asked for.
            ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except MemoryError:
            raise
        except Exception as error:  # as above; also lone surrogates, which a template can write
            raise Refused("encode_failed", f"the tokenizer cannot encode this text: {error}") from error
        packed = array("I", ids)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()


class ChatTemplate:
    """A chat template in an environment equal to that of transformers' `apply_chat_template`.

    Source: transformers 5.23 `utils/chat_template_utils.py`; kept equal by a differential test.
    """

    def __init__(self, source: str) -> None:
        self._now_seconds = 0.0
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        environment.globals["dict"] = TemplateDict()
        environment.globals["namespace"] = TemplateNamespace
        try:
            self._template = environment.from_string(source)
        except MemoryError:
            raise
        except Exception as error:  # a stranger's template can make the compiler raise anything
            raise Refused("template_invalid", f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        special_tokens: dict[str, str],
        now_seconds: float,
    ) -> str:
        """Raises Refused: `template_refused` when the template says so itself, `template_error` when it breaks."""
        self._now_seconds = now_seconds
        variables: dict[str, Any] = {
            **special_tokens,
            "messages": [_prepared(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                length += len(part)
                if length > RENDERED_CHARACTERS_MAX:
                    break
                parts.append(part)
        except MemoryError:
            raise
        except TemplateRefusal as refusal:
            raise Refused("template_refused", str(refusal.message)) from refusal
        except Exception as error:  # a stranger's template can raise anything
            raise Refused("template_error", f"the chat template failed: {type(error).__name__}: {error}") from error
        if length > RENDERED_CHARACTERS_MAX:
            raise Refused("template_output", f"the chat template wrote over {RENDERED_CHARACTERS_MAX} characters")
        return "".join(parts)

    def _strftime_now(self, format: str) -> str:
        return datetime.fromtimestamp(self._now_seconds).strftime(format)


class TemplateRefusal(jinja2.exceptions.TemplateError):
    """A template's own raise_exception."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; for serving it is its body."""

    tags = {"generation"}  # noqa: RUF012 the name and kind that jinja2 reads

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(line)
        return block

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class TemplateDict:
    """`dict` without the class behind it, whose attributes would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` that refuses underscore names, the way to CPython's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Jinja2's own trick, so that `namespace(self=…)` works.
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            TemplateNamespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _prepared(message: dict[str, Any]) -> dict[str, Any]:
    """As `apply_chat_template`: keys without a value are dropped, reasoning goes by every name that templates read."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[field] for field in REASONING_FIELDS if field in present), None)
    if reasoning is None:
        return present
    return {"thinking": reasoning, **present, "reasoning_content": reasoning}


# ---------------------------------------------------------------- what each id prints


class _TokenizerFile(msgspec.Struct):
    decoder: Any = None


def describe(loaded: LoadedClass, tokenizer_json: bytes) -> Table:
    """The table of a class. Raises Refused when no table can say what this tokenizer's decoder does."""
    tokenizer, size = loaded.tokenizer, loaded.facts.vocab_size
    try:
        decoder = msgspec.json.decode(tokenizer_json, type=_TokenizerFile).decoder
    except (ValueError, RecursionError) as error:
        raise Refused("tokenizer_invalid", f"tokenizer.json cannot be read: {error}") from error
    tokens: list[str | None] = [tokenizer.id_to_token(token_id) for token_id in range(size)]
    # The library tells special tokens by their text, not by their id; so do we.
    specials = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    special_ids = [token_id for token_id, token in enumerate(tokens) if token in specials]
    strip_character, strip_count = _strip_of(decoder)
    first: dict[int, bytes] = {}
    if _is_byte_level(decoder):
        pieces = _byte_level_pieces(tokens)
    else:
        pieces = _pieces_in_context(tokenizer, tokens, set(special_ids), decoder, (strip_character, strip_count), first)
    if any(piece is not None and len(piece) > TOKEN_BYTES_MAX for piece in (*pieces, *first.values())):
        raise Refused("tokenizer_invalid", f"a token is longer than {TOKEN_BYTES_MAX} bytes")
    text = ClassText(
        loaded.facts,
        pieces,
        special_ids=special_ids,
        first=first,
        strip_character=strip_character,
        strip_count=strip_count,
    )
    _verify(text, tokenizer, tokens)
    first_items = list(first.items())
    return Table(
        pages=[_raw(pieces[start : start + TABLE_PAGE_IDS]) for start in range(0, size, TABLE_PAGE_IDS)],
        first=[
            _raw(dict(first_items[start : start + TABLE_PAGE_IDS]))
            for start in range(0, len(first_items), TABLE_PAGE_IDS)
        ],
        special_ids=special_ids,
        strip_character=strip_character,
        strip_count=strip_count,
    )


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


def _members(decoder: Any) -> list[dict[str, Any]]:
    """The decoder as the flat list of its steps."""
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [step for member in decoder.get("decoders", []) for step in _members(member)]
    return [decoder]


def _is_byte_level(decoder: Any) -> bool:
    kinds = [step.get("type") for step in _members(decoder)]
    return kinds[:1] == ["ByteLevel"] and set(kinds) <= {"ByteLevel", "Fuse"}


def _strip_of(decoder: Any) -> tuple[str, int]:
    """(character, how many) that the decoder takes off the front of a whole output: a last Strip after a Fuse."""
    steps = _members(decoder)
    kinds = [step.get("type") for step in steps]
    if len(kinds) < 2 or kinds[-1] != "Strip" or "Fuse" not in kinds:
        return "", 0
    character, start, stop = steps[-1].get("content", ""), steps[-1].get("start", 0), steps[-1].get("stop", 0)
    if stop != 0 or not isinstance(start, int) or not isinstance(character, str) or len(character) != 1:
        raise Refused("tokenizer_unsupported", "the decoder strips the end of the text, which cannot be streamed")
    return (character, start) if start > 0 else ("", 0)


def _byte_level_pieces(tokens: list[str | None]) -> list[bytes | None]:
    """GPT-2's map: each byte is one printable character. A token with a character outside the map is itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    byte_of |= {chr(0x100 + index): byte for index, byte in enumerate(rest)}

    def piece(token: str) -> bytes:
        try:
            return bytes([byte_of[character] for character in token])
        except KeyError:
            return token.encode()

    return [None if token is None else piece(token) for token in tokens]


def _pieces_in_context(
    tokenizer: Tokenizer,
    tokens: list[str | None],
    special_ids: set[int],
    decoder: Any,
    strip: tuple[str, int],
    first: dict[int, bytes],
) -> list[bytes | None]:
    """Any other decoder: what an id adds after a plain letter; `first` is filled with what it says alone, if different.

    With byte fallback, tokens written <0xNN> are that byte; the decoder alone would answer U+FFFD.
    """
    has_byte_fallback = any(step.get("type") == "ByteFallback" for step in _members(decoder))
    anchor = _anchor(tokenizer, tokens, special_ids)
    base = tokenizer.decode([anchor])
    pieces: list[bytes | None] = []
    for token_id, token in enumerate(tokens):
        if token is None:
            pieces.append(None)
            continue
        byte = _fallback_byte(token) if has_byte_fallback else None
        if byte is not None:
            pieces.append(bytes([byte]))
            continue
        together = tokenizer.decode([anchor, token_id], skip_special_tokens=False)
        if not together.startswith(base):
            raise Refused("tokenizer_unsupported", f"the decoder rewrites earlier text at token {token_id}")
        piece = together[len(base) :]
        pieces.append(piece.encode())
        alone = tokenizer.decode([token_id], skip_special_tokens=False)
        if alone != _stripped(piece, *strip):
            first[token_id] = alone.encode()
    return pieces


def _stripped(text: str, character: str, count: int) -> str:
    while count and text.startswith(character):
        text, count = text[1:], count - 1
    return text


def _anchor(tokenizer: Tokenizer, tokens: list[str | None], special_ids: set[int]) -> int:
    for length_max in (1, TOKEN_BYTES_MAX):
        for token_id, token in enumerate(tokens):
            if token and token_id not in special_ids and len(token) <= length_max and token.isascii():
                shown = tokenizer.decode([token_id])
                if shown.isascii() and shown.isalpha():
                    return token_id
    raise Refused("tokenizer_unsupported", "no token of this vocabulary is a plain word")


def _fallback_byte(token: str) -> int | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _verify(text: ClassText, tokenizer: Tokenizer, tokens: list[str | None]) -> None:
    """The table against the tokenizer's own decoder, wherever the bytes are valid UTF-8. Raises Refused.

    Repairing broken bytes is ours to define (decoders differ among themselves); everything else must be equal.
    """
    for ids in _probes(tokenizer, tokens):
        try:
            b"".join(map(text.token_bytes, ids)).decode()
        except UnicodeDecodeError:
            continue
        stream = TextStream(text)
        ours = "".join([*map(stream.push, ids), stream.finish()])
        theirs = tokenizer.decode(ids, skip_special_tokens=True)
        if ours != theirs:
            raise Refused(
                "tokenizer_unsupported", f"its decoder cannot be streamed: {theirs[:80]!r} came as {ours[:80]!r}"
            )


def _probes(tokenizer: Tokenizer, tokens: list[str | None]) -> Iterator[list[int]]:
    """Sequences of ids in which a decoder that looks at its neighbours would show itself."""
    chance = random.Random(0)
    for sample in VERIFIED_TEXTS:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        yield [token_id for token_id in ids if token_id < len(tokens)]
    known = [token_id for token_id, token in enumerate(tokens) if token is not None]
    if not known:
        return
    short = [token_id for token_id, token in enumerate(tokens) if token is not None and len(token) <= 2] or known
    for number in range(VERIFIED_SEQUENCES):
        pool = short if number % 3 == 0 else known
        ids = [chance.choice(pool) for _ in range(chance.randint(1, VERIFIED_LENGTH_IDS))]
        yield [ids[0]] * len(ids) if number % 10 == 0 else ids


# ---------------------------------------------------------------- the process


def _read_request(source: BinaryIO) -> tuple[bytes, float] | None:
    """(body, seconds it may take); None when the network has closed the pipe, also in the middle of a frame."""
    header = source.read(REQUEST_HEADER.size)
    if len(header) < REQUEST_HEADER.size:
        return None
    length, seconds = REQUEST_HEADER.unpack(header)
    body = source.read(length)
    return (body, seconds) if len(body) == length else None


def _start_clock(seconds: float) -> None:
    """From here the call has this long, on the wall and on the processor; the signals' default action is death."""
    cpu_seconds = math.ceil(time.process_time() + seconds) + 1  # the kernel counts whole seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _die_with_parent() -> None:
    """Linux only; elsewhere the closed pipe and the alarm end an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _warm_up() -> None:
    """Imports what a call could import late, since afterwards no file can be opened."""
    for name in ("jinja2.debug", "textwrap", "pprint", "encodings.unicode_escape"):
        importlib.import_module(name)
    everything = ChatTemplate(
        "{% macro m(x) %}{{ x | tojson }}{% endmacro %}{{ m(messages) }}{{ strftime_now('%d %b %Y') }}{{ '\\u00e9' }}"
        "{% generation %}{% endgeneration %}{% for i in range(2) %}{% break %}{% endfor %}"
        "{{ messages | map(attribute='role') | join | title | urlize | wordwrap | pprint }}"
    )
    everything.render([{"role": "user", "content": "x"}], None, True, {}, 0.0)
    for broken in ("{{ 1 / 0 }}", "{{ raise_exception('x') }}", "{{ nothing.at.all }}"):
        try:
            ChatTemplate(broken).render([], None, True, {}, 0.0)
        except Refused:
            pass  # the point: raising has imported what raising needs


def _give_up_the_outside() -> None:
    """No new file, socket, process or core dump, and nothing written but the pipe that is open."""
    open_now = 3  # stdin, stdout, stderr
    for limit, value in (
        (resource.RLIMIT_NOFILE, open_now),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main(int(sys.argv[1]))
