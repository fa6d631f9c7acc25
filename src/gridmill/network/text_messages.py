"""What the network and its text workers say to each other: length-prefixed MessagePack frames over two pipes.

The network side asks one thing at a time and gets one answer. It believes nothing it is answered beyond the types here,
because a worker runs tokenizers and templates that strangers wrote. Importing this module must stay cheap.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

REQUEST_HEADER = struct.Struct("<If")  # bytes that follow, and the seconds the worker may take
REPLY_HEADER = struct.Struct("<I")  # bytes that follow
DETAIL_CHARACTERS_MAX = 500  # a sentence for a person; a template chooses it, so it may not be a document
EXIT_MEMORY = 77  # how a worker says that it met its memory limit; any free number
TABLE_PAGE_IDS = 4096  # the network decodes one page per turn of its event loop: well under a millisecond each


class Load(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Have this class at hand, and of the others only `keep`. `describe` asks for its Table instead of Loaded."""

    class_id: str
    tokenizer: bytes
    facts: bytes
    keep: tuple[str, ...]
    describe: bool


class EncodeChat(msgspec.Struct, frozen=True, array_like=True, tag="chat"):
    """Apply the chat template, then encode without adding special tokens. `now_seconds` is what strftime_now shows."""

    class_id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    now_seconds: float


class Encode(msgspec.Struct, frozen=True, array_like=True, tag="encode"):
    class_id: str
    text: str
    add_special_tokens: bool


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Sent once, when the limits are in force."""


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    pass


class Ids(msgspec.Struct, frozen=True, array_like=True, tag="ids"):
    """Packed uint32 little-endian."""

    packed: bytes


class Table(msgspec.Struct, frozen=True, array_like=True, tag="table"):
    """What `detokenise.ClassText` is made of: `pages` of `list[bytes | None]`, `first` of `dict[int, bytes]`."""

    pages: list[msgspec.Raw]
    first: list[msgspec.Raw]
    special_ids: list[int]
    strip_character: str
    strip_count: int


class Problem(msgspec.Struct, frozen=True, array_like=True, tag="problem"):
    """The call failed and the worker is fine. Codes are listed at `text.TextError`."""

    code: str
    detail: str


Request = Load | EncodeChat | Encode
Reply = Ready | Loaded | Ids | Table | Problem


def request_frame(request: Request, seconds: float) -> bytes:
    body = msgspec.msgpack.encode(request)
    return REQUEST_HEADER.pack(len(body), seconds) + body


def reply_frame(reply: Reply) -> bytes:
    body = msgspec.msgpack.encode(reply)
    return REPLY_HEADER.pack(len(body)) + body
