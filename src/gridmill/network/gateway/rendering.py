"""Ids to text, and text to the JSON of OpenAI's two answer shapes. No I/O.

- A `Choice` is one Work on its way to text; a `Format` knows the JSON around it, streamed and not.
- An event that shows a text is prefix + JSON string + suffix, with prefix and suffix made once per choice.
- With logprobs, an id's entry leaves with the chunk that shows the id's first character.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from gridmill.network.detokenise import ClassText, TextStream
from gridmill.network.faults import NodeFault
from gridmill.network.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)
from gridmill.network.journey import Outcome
from gridmill.network.registry import ModelCard
from gridmill.network.text import TextService
from gridmill.wire.messages import Emission
from gridmill.wire.sampling import TokenLogprob

FINGERPRINT_CHARACTERS = 16  # of the class id; more than the eight that NAME@CLASS8 takes
LOGPROB_OF_IMPOSSIBLE = -9999.0  # JSON has no infinity; OpenAI's own stand-in

_encode = msgspec.json.Encoder().encode


class Format(ABC):
    """What differs between the two endpoints: names, and the JSON around a choice."""

    endpoint: str
    id_prefix: str
    prompt_param: str
    object_plain: str
    object_chunk: str
    text_opening: bytes  # between a choice's index and its text, in a chunk
    text_closing: bytes

    def __init__(
        self,
        request_id: str,
        created: int,
        card: ModelCard,
        request: ChatRequest | CompletionRequest,
        text: ClassText,
    ) -> None:
        self.text = text
        self._request = request
        self.head = {
            "id": request_id,
            "object": self.object_chunk if request.stream else self.object_plain,
            "created": created,
            "model": card.name,
            "system_fingerprint": card.class_id[:FINGERPRINT_CHARACTERS],
        }
        if request.service_tier is not None:
            self.head["service_tier"] = request.service_tier
        # As OpenAI: with include_usage every chunk carries the field, and only the last one a value.
        self._chunk_opening = b"data: " + _encode(self.head)[:-1] + b',"choices":['
        self._chunk_closing = b',"usage":null}\n\n' if request.include_usage else b"}\n\n"
        self._usage_null: dict[str, Any] = {"usage": None} if request.include_usage else {}

    @staticmethod
    @abstractmethod
    def parse(body: bytes) -> ChatRequest | CompletionRequest:
        """The checked request. Raises RequestError."""

    @staticmethod
    @abstractmethod
    async def encode(texts: TextService, class_id: str, request: Any) -> list[list[int]]:
        """The request's prompts as token ids."""

    def choice(self, index: int, hidden: frozenset[int]) -> Choice:
        """`hidden` are the ids that end an answer and are not shown."""
        make = ScoredChoice if self._request.top_logprobs is not None else Choice
        return make(self, index, stop=self._request.stop, hidden=hidden)

    @abstractmethod
    def logprobs(self, entries: Sequence[Scored]) -> dict[str, Any] | None:
        """The log probabilities of shown ids, in this API's shape."""

    @abstractmethod
    def delta(
        self, index: int, text: str | None, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        """A choice in a chunk."""

    @abstractmethod
    def whole(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        """A choice in a plain answer."""

    def opening_event(self, index: int) -> bytes:
        return b""

    def text_event_around(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after a JSON string to make it the event that shows a text."""
        prefix = self._chunk_opening + b'{"index":' + str(index).encode() + self.text_opening
        return prefix, self.text_closing + b',"logprobs":null,"finish_reason":null}]' + self._chunk_closing

    def scored_event(self, index: int, text: str, entries: Sequence[Scored]) -> bytes:
        choice = self.delta(index, text, self.logprobs(entries), None)
        return self._chunk_opening + _encode(choice) + b"]" + self._chunk_closing

    def finish_event(self, index: int, reason: str, gridmill: dict[str, Any]) -> bytes:
        choice = self.delta(index, None, None, reason)
        return _event({**self.head, "choices": [choice], **self._usage_null, "gridmill": gridmill})

    def usage_event(self, usage: dict[str, Any], gridmill: dict[str, Any]) -> bytes:
        return _event({**self.head, "choices": [], "usage": usage, "gridmill": gridmill})

    def answer(self, choices: Sequence[Choice], usage: dict[str, Any], gridmill: dict[str, Any]) -> bytes:
        shown = []
        for choice in choices:
            text = "".join([text for text, _ in choice.pieces])
            entries = [entry for _, some in choice.pieces for entry in some]
            logprobs = self.logprobs(entries) if isinstance(choice, ScoredChoice) else None
            shown.append(self.whole(choice.index, text, logprobs, choice.finish_reason))
        return _encode({**self.head, "choices": shown, "usage": usage, "gridmill": gridmill})


class ChatFormat(Format):
    endpoint = "chat_completions"
    id_prefix = "chatcmpl-"
    prompt_param = "messages"
    object_plain = "chat.completion"
    object_chunk = "chat.completion.chunk"
    text_opening = b',"delta":{"content":'
    text_closing = b"}"

    @staticmethod
    def parse(body: bytes) -> ChatRequest:
        return parse_chat(body)

    @staticmethod
    async def encode(texts: TextService, class_id: str, request: ChatRequest) -> list[list[int]]:
        return [await texts.encode_chat(class_id, request.messages)]

    def opening_event(self, index: int) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._chunk_opening + _encode(choice) + b"]" + self._chunk_closing

    def delta(
        self, index: int, text: str | None, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, entries: Sequence[Scored]) -> dict[str, Any]:
        return {"content": [self._entry(entry) for entry in entries], "refusal": None}

    def _entry(self, entry: Scored) -> dict[str, Any]:
        chosen = self._one(entry.token_id, entry.logprob.logprob)
        return {**chosen, "top_logprobs": [self._one(token_id, logprob) for token_id, logprob in entry.logprob.top]}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self.text.token_bytes(token_id)),
        }


class CompletionFormat(Format):
    endpoint = "completions"
    id_prefix = "cmpl-"
    prompt_param = "prompt"
    object_plain = "text_completion"
    object_chunk = "text_completion"
    text_opening = b',"text":'
    text_closing = b""

    @staticmethod
    def parse(body: bytes) -> CompletionRequest:
        return parse_completion(body)

    @staticmethod
    async def encode(texts: TextService, class_id: str, request: CompletionRequest) -> list[list[int]]:
        return [
            await texts.encode(class_id, prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in request.prompts
        ]

    def delta(
        self, index: int, text: str | None, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": reason}

    def whole(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, entries: Sequence[Scored]) -> dict[str, Any]:
        """OpenAI's older format: parallel lists. The chosen token is in its top list even if it is not at the top."""
        return {
            "tokens": [self.text.token_text(entry.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.logprob.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, entry: Scored) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.logprob.top, (entry.token_id, entry.logprob.logprob)):
            # Two ids may look alike (bytes of a character that is not whole): the likelier one keeps the name.
            top.setdefault(self.text.token_text(token_id), _finite(logprob))
        return top


# ---------------------------------------------------------------- one choice


class Scored(msgspec.Struct, frozen=True):
    """One visible id with its logprobs; `offset` is where its text begins in the choice's text, in characters."""

    token_id: int
    offset: int
    logprob: TokenLogprob


Piece = tuple[str, Sequence[Scored]]


class Choice:
    """One Work's ids on their way to text."""

    def __init__(self, form: Format, index: int, *, stop: tuple[str, ...], hidden: frozenset[int]) -> None:
        self.index = index
        self.tokens = 0  # ids taken so far, hidden ones included
        self.complete = False  # a stop string is whole: what follows is not wanted
        self.finish_reason = "stop"
        self.output_tokens = 0
        self.cached_tokens = 0
        self.pieces: list[Piece] = []  # filled only when the answer is not streamed
        self._form = form
        self._prefix, self._suffix = form.text_event_around(index)
        self._stream = TextStream(form.text, stop=stop, hidden_ids=hidden)
        self._may_stop = bool(stop)

    def take(self, emissions: list[Emission]) -> list[Piece]:
        """The pieces of text that these ids let out, one for each id that lets any out."""
        push, may_stop = self._stream.push, self._may_stop
        pieces: list[Piece] = []
        for emission in emissions:
            for token_id in emission.ids:
                self.tokens += 1
                text = push(token_id)
                if text:
                    pieces.append((text, ()))
                if may_stop and self._stream.stopped:
                    self.complete = True
                    return pieces
        return pieces

    def events(self, pieces: list[Piece]) -> bytes:
        """The pieces as server-sent events."""
        prefix, suffix = self._prefix, self._suffix
        return b"".join([prefix + _encode(text) + suffix for text, _ in pieces])

    def finish(self, outcome: Outcome) -> list[Piece]:
        """Notes how it ended; the text that was held back until now, if any."""
        self.output_tokens = outcome.output_tokens
        self.cached_tokens = outcome.cached_tokens
        self.finish_reason = "length" if outcome.kind == "length" else "stop"
        text = "" if self.complete else self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"
        return [(text, ())] if text else []


class ScoredChoice(Choice):
    """With logprobs: an id's entry leaves with the chunk that shows the id's first character.

    Ids of which nothing is ever shown (end ids, what a stop string cut off) have no entry. The second text stream,
    without stop strings, tells where each id's text begins even while the first one holds text back.
    """

    def __init__(self, form: Format, index: int, *, stop: tuple[str, ...], hidden: frozenset[int]) -> None:
        super().__init__(form, index, stop=stop, hidden=hidden)
        self._plain = TextStream(form.text, stop=(), hidden_ids=hidden)
        self._hidden = hidden
        self._begun_characters = 0
        self._shown_characters = 0
        self._waiting: deque[Scored] = deque()

    def take(self, emissions: list[Emission]) -> list[Piece]:
        pieces: list[Piece] = []
        for emission in emissions:
            if emission.logprobs is None or len(emission.logprobs) != len(emission.ids):
                raise NodeFault("logprobs_missing", "the node did not send the log probabilities that were asked for")
            for token_id, logprob in zip(emission.ids, emission.logprobs, strict=True):
                self.tokens += 1
                if token_id not in self._hidden:
                    self._waiting.append(Scored(token_id, self._begun_characters, logprob))
                self._begun_characters += len(self._plain.push(token_id))
                text = self._stream.push(token_id)
                if text:
                    pieces.append(self._piece(text))
                if self._stream.stopped:
                    self.complete = True
                    return pieces
        return pieces

    def events(self, pieces: list[Piece]) -> bytes:
        return b"".join([self._form.scored_event(self.index, text, entries) for text, entries in pieces])

    def finish(self, outcome: Outcome) -> list[Piece]:
        tail = super().finish(outcome)
        text, entries = self._piece("".join([text for text, _ in tail]))
        if not (self.complete or self._stream.stopped):
            entries = [*entries, *self._waiting]  # ids at the very end that have no text of their own
        return [(text, entries)] if text or entries else []

    def _piece(self, text: str) -> Piece:
        self._shown_characters += len(text)
        entries = []
        while self._waiting and self._waiting[0].offset < self._shown_characters:
            entries.append(self._waiting.popleft())
        return text, entries


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def _finite(logprob: float) -> float:
    return min(logprob, 0.0) if math.isfinite(logprob) else LOGPROB_OF_IMPOSSIBLE
