"""Choices on their way to one caller: what every answer says around them."""

from __future__ import annotations

from typing import Any

from gridmill.network.gateway.asgi import EVENT_STREAM
from gridmill.network.gateway.exchange import Exchange
from gridmill.network.gateway.rendering import Choice, Format
from gridmill.network.gateway.requests import ChatRequest, CompletionRequest


class Showing:
    """Choices on their way to one caller: the head of a stream, and the usage at the end."""

    def __init__(self, exchange: Exchange, form: Format, request: ChatRequest | CompletionRequest) -> None:
        self.choices: list[Choice] = []
        self.exchange = exchange
        self.client = exchange.client
        self.form = form
        self.request = request

    async def open(self) -> None:
        """The head, and the chunk in which OpenAI tells the role."""
        headers = [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self.client.send_head(200, [*headers, *self.exchange.headers()])
        self.exchange.head_sent = True
        opening = b"".join([self.form.opening_event(choice.index) for choice in self.choices])
        if opening:
            await self.client.send_body(opening)

    def gridmill(self) -> dict[str, Any]:
        return {"nodes": self.exchange.nodes, "request_id": self.exchange.request_id}

    def usage(self, charge_nanocredits: int) -> dict[str, Any]:
        per_prompt = self.request.n
        prompt_tokens = self.exchange.prompt_tokens
        completion_tokens = sum([choice.output_tokens for choice in self.choices])
        # One prompt is counted once, so what it found cached is what the least lucky of its choices found.
        cached_tokens = sum(
            [
                min([choice.cached_tokens for choice in self.choices[first : first + per_prompt]])
                for first in range(0, len(self.choices), per_prompt)
            ]
        )
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
            "cost_nanocredits": charge_nanocredits,
        }
