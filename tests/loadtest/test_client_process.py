"""A client process by itself: what it says when it is told nonsense, and that it does not outlive the generator."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common.errors import InternalError
from loadtest.client_messages import (
    ClientSpec,
    Failed,
    Finished,
    FromClient,
    PlanEnd,
    Ready,
    Recorded,
    Start,
    ToClient,
    from_client,
    to_client,
    to_line,
)
from loadtest.clock import MonotonicClock
from loadtest.prompts import PromptSpec
from loadtest.record import RequestRecord
from loadtest.sender import SendOptions
from loadtest.targets.base import TargetSpec
from loadtest.workload import PlannedRequest
from tests.loadtest.fake_inference import FakeInference, serving


def _spec(address: str) -> ClientSpec:
    return ClientSpec(TargetSpec("baton", address), PromptSpec(0, 900, 512), SendOptions(600.0, 64))


class _Client:
    """The process, spoken to as the generator does."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def tell(self, message: ToClient) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(to_line(message))

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def hear(self) -> FromClient:
        assert self.process.stdout is not None
        async with asyncio.timeout(20.0):
            return from_client(await self.process.stdout.readline())


@asynccontextmanager
async def _client() -> AsyncIterator[_Client]:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "loadtest.client_process")
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield _Client(process)
        async with asyncio.timeout(20.0):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_nonsense_is_answered_with_a_failure() -> None:
    async with _client() as client:
        client.tell(PlanEnd())
        assert await client.hear() == Failed("InternalError", "the first message is not a specification")
    assert client.process.returncode == 1


async def _stalled_on_one_request(client: _Client, fake: FakeInference) -> None:
    client.tell(_spec(fake.address))
    assert await client.hear() == Ready()
    client.tell(Start(MonotonicClock().now_s()))
    client.tell(PlannedRequest(0, 0.0, 8, 4))
    client.tell(PlanEnd())
    await fake.stalled.wait()


async def test_it_ends_what_is_in_flight_when_the_generator_is_gone() -> None:
    async with serving(FakeInference(num_before_end=0)) as fake, _client() as client:
        await _stalled_on_one_request(client, fake)
        client.end_input()
        recorded = await client.hear()
        assert isinstance(recorded, Recorded)
        assert recorded.record.outcome == "Interrupted"
        assert await client.hear() == Finished()


async def test_it_leaves_ctrl_c_to_the_generator_and_stops_when_told() -> None:
    async with serving(FakeInference(num_before_end=0)) as fake, _client() as client:
        await _stalled_on_one_request(client, fake)
        client.process.send_signal(signal.SIGINT)
        client.process.terminate()
        recorded = await client.hear()
        assert isinstance(recorded, Recorded)
        assert recorded.record.outcome == "Interrupted"
        assert await client.hear() == Finished()
    assert client.process.returncode == 0


def test_messages_come_back_as_they_were() -> None:
    record = RequestRecord(
        index=1, due_s=0.5, sent_s=0.6, ended_s=2.0, num_prompt_tokens=8, max_tokens=4, arrivals=(), outcome="ok"
    )  # fmt: skip
    for sent in (Ready(), Recorded(record), Failed("NotFound", "x"), Finished()):
        assert from_client(to_line(sent)) == sent
    for told in (_spec("a:1"), Start(3.5), PlannedRequest(1, 0.1, 8, 4, (1, 2)), PlanEnd()):
        assert to_client(to_line(told)) == told
    with pytest.raises(InternalError, match="not a message"):
        from_client(b"Traceback (most recent call last):\n")
