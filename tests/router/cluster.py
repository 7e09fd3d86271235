"""A router between fake workers and a client, all in one event loop and over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from baton.v1 import inference_pb2, inference_pb2_grpc

from common.rpc.client import open_channel
from common.telemetry.tracing import Tracing
from services.router.config import RouterConfig
from services.router.process import RouterProcess
from services.router.served_model import load_served_model
from services.router.worker_list import Role
from tests.router.byte_checkpoint import CHAT_TEMPLATE, write_byte_checkpoint
from tests.router.fake_workers import MAX_MESSAGE_BYTES, FakeDecode, FakePrefill, Script, Tickets


@dataclass
class Output:
    """What a client got of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprob_ids: list[int] = field(default_factory=list)
    last: inference_pb2.GenerateResponse | None = None


@dataclass
class Cluster:
    """The parts, for tests to reach into."""

    script: Script
    prefills: list[FakePrefill]
    decodes: list[FakeDecode]
    router: RouterProcess
    channel: grpc.aio.Channel
    stub: inference_pb2_grpc.InferenceAsyncStub

    @property
    def num_opened(self) -> int:
        return sum(len(decode.opened) for decode in self.decodes)

    @property
    def num_prefills(self) -> int:
        return sum(len(prefill.requests) for prefill in self.prefills)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until what the router knows of its workers satisfies the condition."""
        async with asyncio.timeout(20):
            while not condition():
                await self.router.registry.wait_changed()

    async def wait_until_serving(self, serving: bool = True) -> None:
        await self.wait_until(lambda: self.router.registry.has_pair is serving)

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0
    ) -> dict[int, Output]:
        """Everything the client sees, by choice."""
        outputs: dict[int, Output] = {}
        async for response in self.stub.Generate(request, timeout=timeout_s):
            collect(outputs, response)
        return outputs

    async def wait_opened(self) -> FakeDecode:
        """The decode worker that has the first sequence, once one has."""
        seen = {asyncio.ensure_future(decode.open_seen.wait()): decode for decode in self.decodes}
        done, rest = await asyncio.wait(seen, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        for waiting in rest:
            waiting.cancel()
        return seen[done.pop()]

    async def wait_all_closed(self) -> None:
        """Until no decode worker holds a sequence."""
        async with asyncio.timeout(20):
            while any(decode.open for decode in self.decodes):
                for decode in self.decodes:
                    if decode.open:
                        decode.close_seen.clear()
                        await decode.close_seen.wait()


def collect(outputs: dict[int, Output], response: inference_pb2.GenerateResponse) -> None:
    """Add one message to what the client has."""
    output = outputs.setdefault(response.choice, Output())
    assert output.last is None, "a message after the last one of its choice"
    output.token_ids += response.token_ids
    output.text += response.text_delta
    output.logprob_ids += [entry.chosen.token_id for entry in response.logprobs]
    if response.finish_reason:
        output.last = response


@contextlib.asynccontextmanager
async def running_cluster(
    directory: Path,
    *,
    num_prefills: int = 1,
    num_decodes: int = 1,
    tracing: Tracing | None = None,
    chat_template: str = CHAT_TEMPLATE,
    **settings: object,
) -> AsyncIterator[Cluster]:
    """Fakes, a router that knows them, and a client; all of it is gone afterwards."""
    script = Script()
    tickets = Tickets()
    prefills = [FakePrefill(f"prefill-{index}", script, tickets) for index in range(num_prefills)]
    decodes = [FakeDecode(f"decode-{index}", script, tickets) for index in range(num_decodes)]
    for worker in (*prefills, *decodes):
        await worker.start()
    values: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "model": write_byte_checkpoint(directory, chat_template=chat_template),
        "model_name": "bytes",
        "prefill": tuple(worker.address for worker in prefills),
        "decode": tuple(worker.address for worker in decodes),
    }
    config = RouterConfig.model_validate(values | settings)
    model = load_served_model(
        config.served_model_name, config.model, config.max_message_bytes, config.generation_defaults
    )
    router = RouterProcess(config, model, random.Random(7), tracing)
    try:
        async with router.running():
            channel = open_channel(f"127.0.0.1:{router.port}", 4 * MAX_MESSAGE_BYTES)
            stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
            cluster = Cluster(script, prefills, decodes, router, channel, stub)
            counts = {Role.PREFILL: num_prefills, Role.DECODE: num_decodes}
            await cluster.wait_until(
                lambda: all(len(router.registry.candidates(role)) >= count for role, count in counts.items())
            )
            yield cluster
            await channel.close()
    finally:
        for worker in (*prefills, *decodes):
            await worker.die()
