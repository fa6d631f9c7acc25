"""The plain proxies we compare with: Starlette in front, aiohttp or httpx behind, SSE passed through chunk by chunk.

They check one fixed key and nothing else: no metering, no template, no tokenizer, no detokeniser.
Usage: plain_proxy.py PORT aiohttp|httpx, with UPSTREAM in the environment.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

UPSTREAM = os.environ.get("UPSTREAM", "")
KEY = "Bearer sk-bench"
JSON = {"content-type": "application/json"}


@contextlib.asynccontextmanager
async def aiohttp_client(app: Starlette) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app.state.client:
        yield


@contextlib.asynccontextmanager
async def httpx_client(app: Starlette) -> AsyncIterator[None]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60) as app.state.client:
        yield


async def over_aiohttp(request: Request) -> Response:
    if request.headers.get("authorization") != KEY:
        return Response(status_code=401)
    client: aiohttp.ClientSession = request.app.state.client
    upstream = await client.post(UPSTREAM, data=await request.body(), headers=JSON)
    if upstream.headers["content-type"] == "application/json":
        async with upstream:
            return Response(await upstream.read(), media_type="application/json")

    async def pieces() -> AsyncIterator[bytes]:
        async with upstream:
            async for piece in upstream.content.iter_any():
                yield piece

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def over_httpx(request: Request) -> Response:
    if request.headers.get("authorization") != KEY:
        return Response(status_code=401)
    client: httpx.AsyncClient = request.app.state.client
    sending = client.build_request("POST", UPSTREAM, content=await request.body(), headers=JSON)
    upstream = await client.send(sending, stream=True)
    if upstream.headers["content-type"] == "application/json":
        body = await upstream.aread()
        await upstream.aclose()
        return Response(body, media_type="application/json")

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in upstream.aiter_raw():
            yield piece
        await upstream.aclose()

    return StreamingResponse(pieces(), media_type="text/event-stream")


def app(client: str) -> Starlette:
    handler: Any = over_aiohttp if client == "aiohttp" else over_httpx
    lifespan = aiohttp_client if client == "aiohttp" else httpx_client
    return Starlette(routes=[Route("/v1/chat/completions", handler, methods=["POST"])], lifespan=lifespan)


if __name__ == "__main__":
    uvicorn.run(app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
