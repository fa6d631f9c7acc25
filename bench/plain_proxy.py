"""The plain proxy we compare with: Starlette in front, aiohttp behind, SSE passed through chunk by chunk.

It checks one fixed key and nothing else: no metering, no template, no tokenizer, no detokeniser.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

UPSTREAM = os.environ.get("UPSTREAM", "")
KEY = "Bearer sk-bench"


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        app.state.session = session
        yield


async def chat(request: Request) -> Response:
    if request.headers.get("authorization") != KEY:
        return Response(status_code=401)
    body = await request.body()
    session: aiohttp.ClientSession = request.app.state.session
    upstream = await session.post(UPSTREAM, data=body, headers={"content-type": "application/json"})
    if upstream.headers["content-type"] == "application/json":
        async with upstream:
            return Response(await upstream.read(), media_type="application/json")

    async def pieces() -> AsyncIterator[bytes]:
        async with upstream:
            async for piece in upstream.content.iter_any():
                yield piece

    return StreamingResponse(pieces(), media_type="text/event-stream")


app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
