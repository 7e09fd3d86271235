"""Ten thousand seeded operations against a model: whatever was cancelled is never written again, whatever completed is
exact, and every message is accounted for as received, stale or of the wrong size."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
import torch

from common.errors import Cancelled, PeerLost, Truncated
from common.transport.base import CancelOutcome, Connection, Endpoint, PostedReceive
from tests.transport.conftest import OpenPeer, join
from tests.transport.memory import HOST, Memory
from tests.transport.traffic import CANARY, canary, pattern, until, untouched

NUM_OPERATIONS = 10_000
MAX_SENDS_UNDER_WAY = 16
REUSABLE = (CancelOutcome.DRAINED, CancelOutcome.PEER_LOST)


@dataclass(slots=True)
class Live:
    receive: PostedReceive
    buffer: torch.Tensor  # uint8 [num_bytes]


@dataclass(slots=True)
class Model:
    """One sender, one receiver, and what must be true of every buffer at the end."""

    here: Endpoint
    there: Endpoint
    rng: random.Random
    sender: Connection
    receiver: Connection
    next_tag: int = 0
    live: dict[int, Live] = field(default_factory=dict)
    settled: list[torch.Tensor] = field(default_factory=list)  # given back and refilled with canaries
    exact: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # completed, and the tag that fills them
    sends: set[asyncio.Task[None]] = field(default_factory=set)
    num_sent: int = 0
    num_completed: int = 0
    num_truncated: int = 0
    num_lost: int = 0

    def post(self) -> None:
        self.next_tag += 1
        num_bytes = self.rng.choice([1, 17, 1000, 8192, 20_000, 100_000])
        buffer = canary(num_bytes)
        self.live[self.next_tag] = Live(self.receiver.post_receive(self.next_tag, buffer), buffer)

    async def send(self, tag: int, num_bytes: int) -> None:
        if len(self.sends) >= MAX_SENDS_UNDER_WAY:
            await asyncio.wait(self.sends, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._send(tag, num_bytes))
        self.sends.add(task)
        task.add_done_callback(self.sends.discard)

    async def _send(self, tag: int, num_bytes: int) -> None:
        try:
            await self.sender.send(tag, pattern(num_bytes, tag))
        except PeerLost:
            self.num_lost += 1
        else:
            self.num_sent += 1

    async def step(self) -> None:
        kind = self.rng.choices(
            ["post", "send", "wrong size", "stale", "cancel", "wait", "turn", "reconnect"],
            [30, 20, 3, 5, 10, 15, 16, 0.1],
        )[0]
        tag = self.rng.choice(list(self.live)) if self.live else None
        match kind:
            case "post" if len(self.live) < 64:
                self.post()
            case "send" if tag is not None:
                await self.send(tag, self.live[tag].buffer.numel())
            case "wrong size" if tag is not None:
                await self.send(tag, self.live[tag].buffer.numel() + self.rng.choice([-1, 1, 50_000]) or 2)
            case "stale":
                await self.send(1 << 63 | self.rng.getrandbits(62), self.rng.choice([10, 60_000]))
            case "cancel" if tag is not None:
                await self.cancel(tag)
            case "wait" if tag is not None:
                await self.send(tag, self.live[tag].buffer.numel())
                await self.wait(tag)
            case "reconnect":
                await self.reconnect()
            case _:
                await asyncio.sleep(0)

    async def cancel(self, tag: int) -> None:
        one = self.live.pop(tag)
        outcome = await one.receive.cancel(30.0)
        assert outcome in REUSABLE
        await self.count(one.receive)
        one.buffer.fill_(CANARY)
        self.settled.append(one.buffer)

    async def wait(self, tag: int) -> None:
        one = self.live.pop(tag)
        if await self.count(one.receive):
            self.exact.append((one.buffer, tag))

    async def count(self, receive: PostedReceive) -> bool:
        """Whether the receive is complete, and not cancelled."""
        try:
            await receive.wait()
        except Truncated:
            self.num_truncated += 1
            return False
        except (Cancelled, PeerLost):
            return False
        self.num_completed += 1
        return True

    async def reconnect(self) -> None:
        await self.rng.choice([self.sender, self.receiver]).close()
        await until(lambda: not self.sender.alive and not self.receiver.alive)
        for tag in list(self.live):
            await self.cancel(tag)
        self.sender, self.receiver = await join(self.here, self.there, "here")

    async def finish(self) -> None:
        for tag in list(self.live):
            await self.cancel(tag)
        if self.sends:
            await asyncio.wait(self.sends)
        await self.sender.close()
        await self.receiver.close()

    def check(self) -> None:
        assert all(untouched(buffer) for buffer in self.settled)
        assert all(torch.equal(buffer, pattern(buffer.numel(), tag)) for buffer, tag in self.exact)
        stats = self.there.stats()
        assert self.num_completed <= stats.messages_received  # a cancel may drain a message that was complete
        assert stats.messages_received + stats.stale_messages + self.num_truncated <= self.num_sent + self.num_lost


async def test_no_buffer_is_written_after_it_was_given_back(open_peer: OpenPeer, memory: Memory) -> None:
    if memory is not HOST:
        pytest.skip("ten thousand synchronisations with a GPU say nothing that the CPU's do not")
    here, there = await open_peer("here"), await open_peer("there")
    model = Model(here, there, random.Random(20), *await join(here, there, "here"))
    for _ in range(NUM_OPERATIONS):
        await model.step()
    await model.finish()
    model.check()
    assert model.num_completed > 500
    assert model.num_truncated > 50
    assert len(model.settled) > 200
    assert there.stats().stale_messages > 200
