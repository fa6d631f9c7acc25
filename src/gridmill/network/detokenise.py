"""From token ids to characters, one id at a time; pure data and arithmetic, no I/O and nothing hostile runs here.

Three rules. A valid character that is split over ids is never shown broken. What is shown does not depend on how the
ids arrive: pushing them one by one gives the same text as all at once. Nothing of a stop string is ever shown.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Collection, Mapping, Sequence

from gridmill.wire.classes import TextFacts


class TextStream:
    """The text of one answer. `push` every output id in order, then `finish` once.

    `stop`: strings that end the answer, matched on the rendered text. The match that completes first wins; of several
    that complete with the same character, the longest. `hidden_ids` print nothing (end-of-sequence ids, for one).
    `skip_special` hides the tokenizer's special tokens. Raises ValueError on an empty stop string.
    """

    __slots__ = (
        "_careful",
        "_dropped",
        "_hidden",
        "_marker",
        "_pending",
        "_shows_special",
        "_started",
        "_strip_left",
        "_text",
        "_texts",
        "stopped",
    )

    def __init__(
        self,
        text: ClassText,
        *,
        stop: Sequence[str] = (),
        hidden_ids: Collection[int] = (),
        skip_special: bool = True,
    ) -> None:
        self.stopped = False
        self._text = text
        self._texts = text.texts
        self._hidden = frozenset(hidden_ids)
        self._shows_special = not skip_special and bool(text.special_ids)
        self._dropped = self._hidden | text.absent_ids | (text.special_ids if skip_special else frozenset())
        self._marker = _StopMarker(stop) if stop else None
        self._pending = b""  # the beginning of a character whose other bytes have not come yet
        self._started = not text.first  # only where the first id prints differently does it matter which is first
        self._strip_left = text.strip_count
        self._careful = self._needs_care()

    def push(self, token_id: int) -> str:
        """The text that is now safe to show; "" while it is held back. ValueError on an id outside the vocabulary."""
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        try:
            text = self._texts[token_id]
        except IndexError:
            raise ValueError(f"token id {token_id} lies outside the vocabulary of {len(self._texts)}") from None
        if text is None or self._careful or token_id in self._hidden:
            text = self._render(token_id)
        if self._marker is None:
            return text
        return self._mark(text, self._marker)

    def finish(self) -> str:
        """What is still held back; bytes that never became a character are U+FFFD. A second call returns ""."""
        text = self._stripped(self._pending.decode("utf-8", "replace"))
        self._pending = b""
        if self._marker is None:
            return text
        shown = self._mark(text, self._marker)
        return shown if self.stopped else shown + self._marker.release()

    def _mark(self, text: str, marker: _StopMarker) -> str:
        if self.stopped:
            return ""
        shown, self.stopped = marker.feed(text)
        return shown

    def _render(self, token_id: int) -> str:
        """The careful road: at the start of the output, inside a split character, or past hidden and special ids."""
        if token_id in self._dropped:
            return ""
        piece = self._text.piece(token_id)
        if not self._started:
            piece = self._text.first.get(token_id, piece)
            self._started = True
        if isinstance(piece, bytes) or self._pending:
            data = self._pending + (piece if isinstance(piece, bytes) else piece.encode())
            piece, consumed = utf_8_decode(data, "replace", False)
            self._pending = data[consumed:]
        piece = self._stripped(piece)
        self._careful = self._needs_care()
        return piece

    def _stripped(self, text: str) -> str:
        """Some decoders take a few spaces off the front of the whole output, wherever they come from."""
        while self._strip_left and text:
            if text[0] != self._text.strip_character:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text

    def _needs_care(self) -> bool:
        return bool(self._pending) or not self._started or self._strip_left > 0 or self._shows_special


class ClassText:
    """What each id of one class prints. Plain data that a worker process computed; treat it as immutable.

    Every id below `facts.vocab_size` is here; one the tokenizer does not know (embedding padding) prints nothing.
    """

    __slots__ = (
        "_broken",
        "_special",
        "absent_ids",
        "facts",
        "first",
        "longest_token_bytes",
        "special_ids",
        "strip_character",
        "strip_count",
        "texts",
    )

    def __init__(
        self,
        facts: TextFacts,
        pieces: Sequence[bytes | None],
        *,
        special_ids: Collection[int] = (),
        first: Mapping[int, bytes] | None = None,
        strip_character: str = "",
        strip_count: int = 0,
    ) -> None:
        """`pieces[id]` is what the id prints, in bytes that need not be a text of their own; None if it is unknown.

        `first` holds the ids that print something else as the first of an output. Up to `strip_count` times
        `strip_character` is taken off the front of an output. Raises ValueError where these do not fit together.
        """
        if len(pieces) != facts.vocab_size:
            raise ValueError(f"the table has {len(pieces)} ids and the class {facts.vocab_size}")
        if len(strip_character) > 1 or strip_count < 0 or (strip_count > 0 and not strip_character):
            raise ValueError("an output is stripped of one character, some number of times")
        self.facts = facts
        self.special_ids: frozenset[int] = frozenset(special_ids)
        self.absent_ids: frozenset[int] = frozenset(i for i, piece in enumerate(pieces) if piece is None)
        self.first: Mapping[int, str | bytes] = {i: _text_if_whole(piece) for i, piece in (first or {}).items()}
        self.strip_character = strip_character
        self.strip_count = strip_count
        if any(not 0 <= i < len(pieces) for i in (*self.special_ids, *self.first)):
            raise ValueError("the table names ids outside the vocabulary")
        # `texts` is for the hot path: "" where nothing is shown by default, None where bytes must be put together.
        self.texts: list[str | None] = []
        self._broken: dict[int, bytes] = {}
        self._special: dict[int, str | bytes] = {}
        self.longest_token_bytes = 1
        for token_id, piece in enumerate(pieces):
            if token_id in self.special_ids:
                self._special[token_id] = _text_if_whole(piece or b"")
                self.texts.append("")
                continue
            self.longest_token_bytes = max(self.longest_token_bytes, len(piece or b""))
            text = _text_if_whole(piece or b"")
            if isinstance(text, bytes):
                self._broken[token_id] = text
                self.texts.append(None)
            else:
                self.texts.append(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id, as logprobs report them; b"" for special and unknown ids. ValueError when outside."""
        text = self.texts[self._inside(token_id)]
        return self._broken[token_id] if text is None else text.encode()

    def token_text(self, token_id: int) -> str:
        """One id as text for logprobs: broken bytes as U+FFFD, a special token by its name. ValueError when outside."""
        text = self.texts[self._inside(token_id)]
        piece = text or self.piece(token_id)
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | bytes:
        """What an id of the vocabulary prints when nothing is hidden: text, or bytes that are no text alone."""
        text = self.texts[token_id]
        if text is None:
            return self._broken[token_id]
        return text or self._special.get(token_id, "")

    def _inside(self, token_id: int) -> int:
        if not 0 <= token_id < len(self.texts):
            raise ValueError(f"token id {token_id} lies outside the vocabulary of {len(self.texts)}")
        return token_id


def _text_if_whole(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


class _StopMarker:
    """Finds stop strings in a stream of text, holding back the longest tail that could still become one.

    Knuth–Morris–Pratt, one state per stop: linear in the text, however long and repetitive the stops are.
    """

    __slots__ = ("_fallbacks", "_held", "_initials", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._fallbacks = [_fallbacks_of(stop) for stop in self._stops]
        self._initials = tuple({stop[0] for stop in self._stops})
        self._states = [0] * len(self._stops)
        self._held = ""  # always as long as the furthest state

    def feed(self, text: str) -> tuple[str, bool]:
        """(text to show, whether a stop completed). After a stop the marker is spent."""
        if not self._held:
            for initial in self._initials:
                if initial in text:
                    break
            else:
                return text, False
        buffer = self._held + text
        held_before = len(self._held)
        end_best, start_best = len(text) + 1, 0
        for index, stop in enumerate(self._stops):
            end = self._advance(index, text)
            if end < 0 or end > end_best:
                continue
            start = held_before + end - len(stop)
            if end < end_best or start < start_best:
                end_best, start_best = end, start
        if end_best <= len(text):
            self._held = ""
            return buffer[:start_best], True
        shown = len(buffer) - max(self._states)
        self._held = buffer[shown:]
        return buffer[:shown], False

    def release(self) -> str:
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, index: int, text: str) -> int:
        """Takes one stop's state through the text; where in it the stop ends, or -1."""
        stop, fallbacks, state = self._stops[index], self._fallbacks[index], self._states[index]
        position, length = 0, len(text)
        while position < length:
            if state == 0:
                position = text.find(stop[0], position)
                if position < 0:
                    break
                state = 1
                position += 1
            elif stop[state] == text[position]:
                state += 1
                position += 1
            else:
                state = fallbacks[state - 1]
                continue
            if state == len(stop):
                return position
        self._states[index] = state
        return -1


def _fallbacks_of(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix of the stop too."""
    fallbacks = [0] * len(stop)
    state = 0
    for position in range(1, len(stop)):
        while state and stop[state] != stop[position]:
            state = fallbacks[state - 1]
        if stop[state] == stop[position]:
            state += 1
        fallbacks[position] = state
    return fallbacks
