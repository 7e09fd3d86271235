"""A communicator over a library and a stream of the test's own: order, failures, and what an abort leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from common.errors import PeerLost, TransferTimeout
from common.transport.cuda_device import DeviceStream
from common.transport.nccl_communicator import NcclCommunicator
from common.transport.nccl_library import NcclError, NcclLibrary
from tests.transport.traffic import until

CPU = torch.device("cpu")
HANDLE = 7


@dataclass(slots=True, eq=False)
class FakeMark:
    complete: bool = False
    error: RuntimeError | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.complete


@dataclass(slots=True)
class FakeStream:
    marks: list[FakeMark] = field(default_factory=list)
    at_once: bool = True  # what is queued is complete when it is marked
    num_synchronized: int = 0
    handle: int = 99

    def current(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mark(self) -> FakeMark:
        self.marks.append(FakeMark(self.at_once))
        return self.marks[-1]

    def synchronize(self) -> None:
        self.num_synchronized += 1


@dataclass(slots=True)
class FakeLibrary:
    """NCCL in which every call is in progress for some looks."""

    calls: list[tuple[str, int]] = field(default_factory=list)  # (what, num_bytes)
    looks_left: int = 0
    looks_a_call: int = 2
    opens: bool = True
    error: NcclError | None = None
    threads: set[int] = field(default_factory=set)  # that queued transfers
    aborted: list[int] = field(default_factory=list)

    def begin_init(self, unique_id: bytes, rank: int) -> int:
        return HANDLE

    def in_progress(self, communicator: int) -> bool:
        assert communicator == HANDLE
        assert not self.aborted, "NCCL was asked after its abort"
        if self.error is not None:
            raise self.error
        self.looks_left = max(0, self.looks_left - 1)
        return not self.opens or self.looks_left > 0

    def begin_send(self, communicator: int, peer: int, buffer: torch.Tensor, stream: int) -> None:
        self._begin("send", communicator, buffer)

    def begin_receive(self, communicator: int, peer: int, buffer: torch.Tensor, stream: int) -> None:
        self._begin("receive", communicator, buffer)

    def abort(self, communicator: int) -> None:
        self.aborted.append(communicator)

    def _begin(self, what: str, communicator: int, buffer: torch.Tensor) -> None:
        assert communicator == HANDLE
        assert self.looks_left == 0 or self.error is not None, "the call before is still in progress"
        self.looks_left = self.looks_a_call
        self.threads.add(threading.get_ident())
        self.calls.append((what, buffer.numel()))


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


def made(library: FakeLibrary, stream: FakeStream) -> NcclCommunicator:
    return NcclCommunicator(cast(NcclLibrary, library), cast(DeviceStream, stream), CPU, rank=0)


@pytest.fixture
async def communicator(library: FakeLibrary, stream: FakeStream) -> AsyncIterator[NcclCommunicator]:
    one = made(library, stream)
    await one.meet(b"", 5.0)
    library.calls.clear()
    stream.marks.clear()
    stream.at_once = False
    yield one
    await one.abort()


def bytes_of(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


async def test_calls_follow_each_other_while_transfers_run(
    communicator: NcclCommunicator, library: FakeLibrary, stream: FakeStream
) -> None:
    futures = [communicator.send(bytes_of(1)), communicator.receive(bytes_of(2)), communicator.send(bytes_of(3))]
    await until(lambda: len(stream.marks) == 3)
    assert library.calls == [("send", 1), ("receive", 2), ("send", 3)]
    assert library.threads == {threading.get_ident()}
    assert not any(future.done() for future in futures)
    stream.marks[1].complete = True
    await asyncio.sleep(0.01)
    assert not any(future.done() for future in futures), "transfers end in order"
    stream.marks[0].complete = True
    await until(lambda: futures[1].done())
    assert [future.done() for future in futures] == [True, True, False]
    stream.marks[2].complete = True
    await futures[2]


async def test_a_failed_call_fails_its_transfer_and_those_behind_it(
    communicator: NcclCommunicator, library: FakeLibrary, stream: FakeStream
) -> None:
    running = communicator.send(bytes_of(1))
    await until(lambda: len(stream.marks) == 1)
    library.error = NcclError("the network is down")
    for future in (communicator.send(bytes_of(1)), communicator.receive(bytes_of(1))):
        with pytest.raises(PeerLost, match="the network is down"):
            await asyncio.wait_for(future, 20.0)
    assert not running.done()
    stream.marks[0].complete = True
    await asyncio.wait_for(running, 20.0)


async def test_an_error_of_the_device_fails_the_transfer(communicator: NcclCommunicator, stream: FakeStream) -> None:
    future = communicator.send(bytes_of(1))
    await until(lambda: len(stream.marks) == 1)
    stream.marks[0].error = RuntimeError("illegal address")
    with pytest.raises(PeerLost, match="illegal address"):
        await asyncio.wait_for(future, 20.0)


async def test_an_abort_ends_what_runs_what_is_called_and_what_waits(
    communicator: NcclCommunicator, library: FakeLibrary, stream: FakeStream
) -> None:
    running = communicator.send(bytes_of(1))
    await until(lambda: len(stream.marks) == 1)
    library.looks_a_call = 1_000_000
    called, waiting = communicator.receive(bytes_of(2)), communicator.send(bytes_of(3))
    await until(lambda: len(library.calls) == 2)
    aborting = [asyncio.create_task(communicator.abort()) for _ in range(2)]
    await asyncio.sleep(0)
    stream.marks[0].complete = True  # too late to be believed
    await asyncio.gather(*aborting)
    for future in (running, called, waiting, communicator.send(bytes_of(4))):
        assert isinstance(future.exception(), PeerLost)
    assert library.aborted == [HANDLE]
    assert stream.num_synchronized == 1
    assert library.calls == [("send", 1), ("receive", 2)]


async def test_a_future_that_nobody_awaits_any_more_holds_up_nothing(
    communicator: NcclCommunicator, stream: FakeStream
) -> None:
    first, second = communicator.send(bytes_of(1)), communicator.send(bytes_of(1))
    first.cancel()
    await until(lambda: len(stream.marks) == 2)
    for mark in stream.marks:
        mark.complete = True
    await asyncio.wait_for(second, 20.0)


async def test_one_that_does_not_open_in_time_is_aborted(library: FakeLibrary, stream: FakeStream) -> None:
    library.opens = False
    with pytest.raises(TransferTimeout):
        await made(library, stream).meet(b"", 0.02)
    assert library.aborted == [HANDLE]


async def test_cancelling_the_opening_aborts_it(library: FakeLibrary, stream: FakeStream) -> None:
    library.opens = False
    opening = asyncio.create_task(made(library, stream).meet(b"", 60.0))
    await asyncio.sleep(0.01)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(opening, 20.0)
    assert library.aborted == [HANDLE]


async def test_an_opening_that_nccl_refuses_is_a_lost_peer(library: FakeLibrary, stream: FakeStream) -> None:
    library.error = NcclError("no such rank")
    with pytest.raises(PeerLost, match="no such rank"):
        await made(library, stream).meet(b"", 5.0)
