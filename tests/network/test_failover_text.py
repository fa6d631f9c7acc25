"""What a caller reads while the work behind it moves: real gateway, dispatcher and links, over HTTP.

The vocabulary is bytes, so that a break can fall into the middle of a character, of a stop string, or between the two
log probabilities of one chunk. Every answer is asked for once unbroken and then once for each place where it can break.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from test_dispatch import CLASS, EOS, FACTS, ScriptedNode, World, play
from test_gateway import FakeRegistry, Scene, parse_events, scene

from gridmill.network.books import Order
from gridmill.network.detokenise import ClassText
from gridmill.network.journey import Outcome
from gridmill.network.registry import ModelCard
from gridmill.wire.messages import Accept, Cancel, Emission, Generate, Offer, Step
from gridmill.wire.sampling import TokenLogprob, unpack_ids

PATIENCE_SECONDS = 10.0


class Telling:
    """An answer that every node knows by heart, and the places where whoever is telling it breaks off."""

    def __init__(self, world: World, text: str, ids_at_once: int = 1) -> None:
        self.ids = [*text.encode(), EOS]
        self.breaks: set[int] = set()
        self.told: list[int] = []  # how many ids each node was given, in the order of their offers
        self._world = world
        self._ids_at_once = ids_at_once

    async def script(self, node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        given = unpack_ids(offer.work.delivered)
        assert given == self.ids[: len(given)], "the next node was told another answer than the caller"
        self.told.append(len(given))
        already = self._world.observer.tokens
        position = len(given)
        while position < len(self.ids):
            if position in self.breaks and position > len(given):
                while self._world.observer.tokens - already < position - len(given):
                    await asyncio.sleep(0)  # what was said gets there
                node.cut()
                return
            if any(cancel.stream == offer.stream for cancel in node.heard_of(Cancel)):
                node.end(offer.stream, position - len(given), "cancelled")
                return
            end = min([position + self._ids_at_once, len(self.ids), *(b for b in self.breaks if b > position)])
            logprobs = tuple(self._scored(offer.work, place) for place in range(position, end))
            wanted = offer.work.sampling.top_logprobs is not None
            emission = Emission(offer.stream, position, tuple(self.ids[position:end]), logprobs if wanted else None)
            node.send(Step((emission,)))
            position = end
            await asyncio.sleep(0)
        node.end(offer.stream, len(self.ids) - len(given), "stop")

    def _scored(self, work: Generate, position: int) -> TokenLogprob:
        count = work.sampling.top_logprobs or 0
        return TokenLogprob(-position / 8, tuple(((position + k) % 256, -position / 8 - k) for k in range(count)))


class Serving:
    """The real dispatcher, under the name by which the scene looks after it."""

    def __init__(self, world: World) -> None:
        self.running = 0
        self._world = world

    async def serve(self, work: Generate, order: Order, emit: Any, **more: Any) -> Outcome:
        return await self._world.dispatcher.serve(work, order, emit, **more)


def registry() -> FakeRegistry:
    made = FakeRegistry()
    made.text = ClassText(FACTS, [bytes([code]) if code < 256 else b"" for code in range(FACTS.vocab_size)])
    made.cards = {"toy": ModelCard("toy", CLASS.class_id, FACTS, "owner-1", 1_700_000_000, False)}
    return made


def over_http(tmp_path: Path, body: Callable[[World, Scene], Awaitable[None]]) -> None:
    async def run(world: World) -> None:
        async with scene() as stage:
            stage.gateway.registry = registry()  # type: ignore[assignment]
            stage.gateway.dispatcher = Serving(world)  # type: ignore[assignment]
            stage.gateway.books = world.books
            await body(world, stage)

    play(tmp_path, run, resume_timeout_seconds=PATIENCE_SECONDS)


async def asked(stage: Scene, **parameters: Any) -> dict[str, Any]:
    """What a caller can tell: text, reason, log probabilities and usage, from a stream or from a plain answer.

    Of a stream also the chunks: where they begin and end says nothing about where the work moved."""
    if not parameters.get("stream"):
        answer = await stage.answer(**parameters)
        [choice] = answer["choices"]
        return {
            "text": choice["message"]["content"],
            "reason": choice["finish_reason"],
            "logprobs": choice["logprobs"],
            "usage": answer["usage"],
        }
    async with stage.chat(stream_options={"include_usage": True}, **parameters) as response:
        assert response.status == 200, await response.text()
        *events, done = parse_events(await response.read())
    assert done == "data: [DONE]", events[-1]
    choices = [choice for event in events for choice in event["choices"]]
    return {
        "chunks": [choice["delta"].get("content") for choice in choices],
        "text": "".join(choice["delta"].get("content") or "" for choice in choices),
        "reason": choices[-1]["finish_reason"],
        "logprobs": [choice["logprobs"] for choice in choices if choice["logprobs"]],
        "usage": events[-1]["usage"],
    }


async def same_wherever_it_breaks(
    world: World, stage: Scene, telling: Telling, breaks: Iterable[set[int]] = (), **parameters: Any
) -> dict[str, Any]:
    """The answer, after it was the same for each set of places where it broke off; by default, for every one place."""
    for _ in range(4):  # three moves at most, each to a node that has not broken off
        await world.join(ScriptedNode(telling.script, slots=4))
    whole = await asked(stage, **parameters)
    for where in breaks or [{place} for place in range(1, whole["usage"]["completion_tokens"])]:
        telling.breaks, telling.told = set(where), []
        broken = await asked(stage, **parameters)
        assert broken == whole, f"broken off after {sorted(where)} ids"
        assert telling.told == [0, *sorted(where)]
        for _ in where:
            await world.join(ScriptedNode(telling.script, slots=4))
    return whole


SHAPES = [{"stream": True}, {"stream": False}, {"stream": True, "logprobs": True, "top_logprobs": 2}]


@pytest.mark.parametrize("shape", [*SHAPES, {"stream": False, "logprobs": True, "top_logprobs": 1}])
def test_a_character_whose_bytes_come_from_two_nodes_is_shown_once_and_whole(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    text = "é🙂 ok €"

    async def body(world: World, stage: Scene) -> None:
        telling = Telling(world, text)
        whole = await same_wherever_it_breaks(world, stage, telling, **shape)
        assert whole["text"] == text and whole["reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == len(telling.ids)

    over_http(tmp_path, body)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stop_string_that_two_nodes_wrote_is_found_and_nothing_of_it_is_shown(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    async def body(world: World, stage: Scene) -> None:
        telling = Telling(world, "a STOP, then STOPPED, and more")
        whole = await same_wherever_it_breaks(world, stage, telling, stop=["STOPPED", "never"], **shape)
        assert (whole["text"], whole["reason"]) == ("a STOP, then ", "stop")
        assert whole["usage"]["completion_tokens"] == len("a STOP, then STOPPED")

    over_http(tmp_path, body)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_held_back_for_a_stop_string_that_never_comes_is_shown_at_the_end(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    async def body(world: World, stage: Scene) -> None:
        telling = Telling(world, "so STO")
        whole = await same_wherever_it_breaks(world, stage, telling, stop="STOP", **shape)
        assert whole["text"] == "so STO"

    over_http(tmp_path, body)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_moves_inside_one_character_and_one_stop_string_change_nothing(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    async def body(world: World, stage: Scene) -> None:
        telling = Telling(world, "x🙂STOPPED", ids_at_once=4)
        thrice = [{2, 3, 4}, {3, 6, 9}, {1, 7, 11}, {9, 10, 11}]
        whole = await same_wherever_it_breaks(world, stage, telling, thrice, stop=["STOPPED"], **shape)
        assert whole["text"] == "x🙂"

    over_http(tmp_path, body)
