"""Communicators between endpoints of one process that copy in order, as NCCL would; for tests on a CPU."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import torch

from common.errors import PeerLost, TransferTimeout
from common.transport.nccl_communicator import Communicator
from common.transport.nccl_library import UNIQUE_ID_BYTES

CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Queued:
    """One transfer of one rank."""

    is_send: bool
    buffer: torch.Tensor  # uint8 [num_bytes]
    done: asyncio.Future[None]


class FakeCommunicator:
    """See `Communicator`. The transfers at the front of both queues belong together, as in NCCL."""

    def __init__(self) -> None:
        self.other: FakeCommunicator = self  # until both have opened
        self.queue: list[Queued] = []
        self.aborted = False
        self.moved = asyncio.Event()

    def send(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        return self._put(True, buffer)

    def receive(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        return self._put(False, buffer)

    async def abort(self) -> None:
        self.aborted = True
        for one in self.queue:
            one.done.set_exception(PeerLost("aborted"))
        self.queue.clear()
        self.moved.set()

    def _put(self, is_send: bool, buffer: torch.Tensor) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.aborted:
            done.set_exception(PeerLost("aborted"))
        else:
            self.queue.append(Queued(is_send, buffer, done))
            self.moved.set()
        return done


@dataclass(slots=True)
class FakeNccl:
    """A `CommunicatorOpener` that all endpoints of a test share."""

    waiting: dict[bytes, FakeCommunicator] = field(default_factory=dict)
    met: dict[bytes, asyncio.Event] = field(default_factory=dict)
    carriers: set[asyncio.Task[None]] = field(default_factory=set)
    ids: itertools.count[int] = field(default_factory=itertools.count)

    def unique_id(self) -> bytes:
        return next(self.ids).to_bytes(UNIQUE_ID_BYTES, "little")

    async def open(self, unique_id: bytes, rank: int, timeout_s: float) -> Communicator:
        made, met = FakeCommunicator(), self.met.setdefault(unique_id, asyncio.Event())
        other = self.waiting.pop(unique_id, None)
        if other is None:
            self.waiting[unique_id] = made
            try:
                await asyncio.wait_for(met.wait(), timeout_s)
            except TimeoutError as error:
                raise TransferTimeout("the other rank did not come") from error
        else:
            made.other, other.other = other, made
            met.set()
            task = asyncio.create_task(_carry(made, other))
            self.carriers.add(task)
            task.add_done_callback(self.carriers.discard)
        return made

    async def close(self) -> None:
        for task in self.carriers:
            task.cancel()
        await asyncio.gather(*self.carriers, return_exceptions=True)


async def _carry(a: FakeCommunicator, b: FakeCommunicator) -> None:
    """Copy a chunk per turn of the loop; an end that aborts stops the transfer before the next chunk."""
    while not (a.aborted and b.aborted):
        if not a.queue or not b.queue:
            for end in (a, b):
                end.moved.clear()
            waits = [asyncio.ensure_future(end.moved.wait()) for end in (a, b)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            continue
        source, target = (a.queue[0], b.queue[0]) if a.queue[0].is_send else (b.queue[0], a.queue[0])
        assert source.is_send != target.is_send, "both ends send, or both receive: they would wait for ever"
        assert source.buffer.numel() == target.buffer.numel(), "the ends disagree on a size"
        await _copy(source, target)
        if not source.done.done() and not target.done.done():
            for end, one in ((a, a.queue.pop(0)), (b, b.queue.pop(0))):
                one.done.set_result(None)
                end.moved.set()


async def _copy(source: Queued, target: Queued) -> None:
    for read, write in zip(
        torch.split(source.buffer, CHUNK_BYTES), torch.split(target.buffer, CHUNK_BYTES), strict=True
    ):
        await asyncio.sleep(0)
        if source.done.done() or target.done.done():
            return
        write.copy_(read)
