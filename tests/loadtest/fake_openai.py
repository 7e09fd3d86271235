"""A real HTTP server with OpenAI's completions interface that answers as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeOpenAI:
    """Streams one word a token. `fault` is what goes wrong after two of them; any `status` but 200 comes before."""

    fault: str = ""  # stall, reset, end, error, garbage
    status: int = 200
    counts_tokens: bool = True  # usage in every event, as vLLM does when asked
    max_model_len: int | None = 512
    bodies: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # a client left a stalled stream

    async def models(self, request: web.Request) -> web.Response:
        first = {"id": "fake", "object": "model"}
        if self.max_model_len is not None:
            first["max_model_len"] = self.max_model_len  # type: ignore[assignment]
        return web.json_response({"object": "list", "data": [first, {"id": "other"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "not now"}}, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for position in range(body["max_tokens"]):
            if position == 2 and self.fault:
                return await self._fail(request, response)
            await response.write(self._event(position + 1, [{"index": 0, "text": f" {position}"}]))
            await asyncio.sleep(0.001)
        await response.write(self._event(body["max_tokens"], []))
        await response.write(b": a comment\n\ndata: [DONE]\n\n")
        return response

    def _event(self, num_tokens: int, choices: list[dict[str, Any]]) -> bytes:
        event: dict[str, Any] = {"id": "cmpl-1", "choices": choices, "usage": None}
        if self.counts_tokens or not choices:
            details = {"cached_tokens": 16}
            event["usage"] = {"prompt_tokens": 1, "completion_tokens": num_tokens, "prompt_tokens_details": details}
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    async def _fail(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        if self.fault == "stall":
            self.stalled.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.gone.set()
        if self.fault == "reset":
            assert request.transport is not None
            request.transport.abort()
        if self.fault == "error":
            await response.write(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')
        if self.fault == "garbage":
            await response.write(b"data: {not json\n\n")
        return response


@asynccontextmanager
async def serving(fake: FakeOpenAI) -> AsyncIterator[FakeOpenAI]:
    """Serve it on a free port."""
    app = web.Application()
    app.add_routes([web.get("/v1/models", fake.models), web.post("/v1/completions", fake.complete)])
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
