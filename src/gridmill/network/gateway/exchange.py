"""One HTTP exchange: how it is answered, how it may end, and what is logged of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gridmill.network.gateway.asgi import JSON, ApiError, Client, ClientGone, Headers


class Exchange:
    """One HTTP exchange: who, what, how it ended. Knows neither prompt nor text, so that a log line cannot either."""

    def __init__(self, client: Client, endpoint: str, request_id: str, clock: Callable[[], float]) -> None:
        self.client = client
        self.endpoint = endpoint
        self.request_id = request_id
        self.clock = clock
        self.started = clock()
        self.first_token_at: float | None = None
        self.head_sent = False
        self.status = 200  # what the caller was told, or would have been had the head not left already
        self.code: str | None = None
        self.account_id: str | None = None
        self.key_id: str | None = None
        self.model: str | None = None
        self.class_id: str | None = None
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.nodes: list[str] = []
        self.replayed = False  # an earlier request with the same Idempotency-Key was answered with this

    def headers(self) -> Headers:
        request_id = self.request_id.encode()
        headers = [(b"x-gridmill-request-id", request_id), (b"x-request-id", request_id)]
        if self.nodes:
            headers.append((b"x-gridmill-node", self.nodes[0].encode("ascii", "replace")))
        if self.replayed:
            headers.append((b"x-gridmill-replayed", b"true"))
        return headers

    async def answer(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.head_sent = True
        await self.client.answer(status, body, JSON, [*self.headers(), *headers])

    async def refuse(self, error: ApiError) -> None:
        """Says what went wrong, as an answer or, when the head of a stream has left, as its last event."""
        self.status, self.code = error.status, error.code
        try:
            with self.client.present():
                if self.head_sent:
                    await self.client.send_body(error_event(error), more=False)
                else:
                    await self.answer(error.status, error.body(), error.headers)
        except ClientGone:
            pass  # Nobody to tell; the status stays that of the error.

    def log_fields(self) -> dict[str, Any]:
        now = self.clock()
        first = self.first_token_at
        return {
            "request_id": self.request_id,
            "endpoint": self.endpoint,
            "account": self.account_id,
            "key": self.key_id,
            "model": self.model,
            "class_id": self.class_id,
            "status": self.status,
            "code": self.code,
            "nodes": self.nodes,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ttft_seconds": None if first is None else round(first - self.started, 6),
            "duration_seconds": round(now - self.started, 6),
        }


def error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"
