"""The smallest honest OpenAI upstream for the proxies we compare with: raw ASGI, answers at once.

POST /v1/chat/completions answers `max_tokens` words, as one JSON body or as one SSE event per word.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn

WORD = " word"
HEAD = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1, "model": "mock"}


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({**HEAD, "choices": [choice]}).encode() + b"\n\n"


ONE = event({"content": WORD})


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    request = json.loads(body or b"{}")
    count = int(request.get("max_tokens", 8))
    if not request.get("stream"):
        answer = json.dumps(
            {
                "id": "chatcmpl-mock",
                "object": "chat.completion",
                "created": 1,
                "model": "mock",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": WORD * count}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count},
            }
        ).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": event({"role": "assistant", "content": ""}), "more_body": True})
    for _ in range(count):
        await send({"type": "http.response.body", "body": ONE, "more_body": True})
    ending = event({}, "stop") + b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": ending})


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
