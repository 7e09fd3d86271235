"""One NCCL communicator of two ranks, used from an event loop: queued transfers, and an abort that ends them.

NCCL matches by order alone, so both ends must queue the same transfers in the same order; `nccl_connection` sees to
that. One thread talks to NCCL and another waits for the device, so a transfer is queued while the one before it runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from common.errors import PeerLost, TransferTimeout
from common.short_sleep import allow_short_sleeps, pause
from common.transport.nccl_library import NcclError, NcclLibrary, nccl_library

_INIT_PAUSE_S = 0.001  # between looks at a communicator that is being opened
_CALL_PAUSE_S = 5e-6  # between looks at a call, which takes some ten microseconds
_ABORT_LEAVES = "the communicator was aborted"


class Communicator(Protocol):
    """Two ranks that send to each other. All methods run on one event loop."""

    def send(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        """Queue a send of uint8 [num_bytes]. The future fails with `PeerLost` if it was not carried out."""
        ...

    def receive(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        """Queue a receive into uint8 [num_bytes]. The future fails with `PeerLost` if it was not carried out."""
        ...

    async def abort(self) -> None:
        """End everything that is queued; idempotent. No buffer is read or written after this returns."""
        ...


class CommunicatorOpener(Protocol):
    """How two ranks come to share a communicator: one draws a unique id and tells it, then both open."""

    def unique_id(self) -> bytes: ...

    async def open(self, unique_id: bytes, rank: int, timeout_s: float) -> Communicator:
        """Meet the other rank. Raises `PeerLost` or `TransferTimeout`; cancelling it leaves nothing behind."""
        ...


class NcclOpener:
    """Opens communicators of NCCL on one device. Raises `FailedPrecondition` where there is no NCCL or no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._library = nccl_library()
        self._device = device

    def unique_id(self) -> bytes:
        return self._library.unique_id()

    async def open(self, unique_id: bytes, rank: int, timeout_s: float) -> Communicator:
        return await NcclCommunicator.open(self._library, self._device, unique_id, rank, timeout_s)


class NcclCommunicator:
    """See `Communicator`. Made by `open`."""

    def __init__(self, library: NcclLibrary, device: torch.device, rank: int) -> None:
        self._library = library
        self._device = device
        self._rank = rank
        self._handle = 0
        self._stream: torch.cuda.Stream | None = None
        self._loop = asyncio.get_running_loop()
        self._aborting = False
        self._aborted: asyncio.Future[None] | None = None
        self._issuer = ThreadPoolExecutor(1, "nccl-issue", _begin_thread, (device,))
        self._waiter = ThreadPoolExecutor(1, "nccl-wait", _begin_thread, (device,))

    @classmethod
    async def open(
        cls, library: NcclLibrary, device: torch.device, unique_id: bytes, rank: int, timeout_s: float
    ) -> NcclCommunicator:
        """See `CommunicatorOpener.open`."""
        made = cls(library, device, rank)
        try:
            await made._loop.run_in_executor(made._issuer, made._init, unique_id, time.monotonic() + timeout_s)
            await made._warm_up()
        except NcclError as error:
            await made.abort()
            raise PeerLost(str(error)) from error
        except BaseException:
            await made.abort()
            raise
        return made

    def send(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        return self._queue(self._library.begin_send, buffer)

    def receive(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        return self._queue(self._library.begin_receive, buffer)

    async def abort(self) -> None:
        self._aborting = True
        if self._aborted is None:
            self._aborted = asyncio.ensure_future(self._loop.run_in_executor(self._issuer, self._abort))
        await asyncio.shield(self._aborted)
        await self._loop.run_in_executor(None, self._shut_down)

    def _queue(
        self, begin: Callable[[int, int, torch.Tensor, int], None], buffer: torch.Tensor
    ) -> asyncio.Future[None]:
        assert buffer.device == self._device
        done: asyncio.Future[None] = self._loop.create_future()
        if self._aborting:
            done.set_exception(PeerLost(_ABORT_LEAVES))
        else:
            self._issuer.submit(self._issue, begin, buffer, done)
        return done

    async def _warm_up(self) -> None:
        """NCCL connects two ranks when they first send to each other; that is slow, so it happens here."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        for sender in (0, 1):
            await (self.send(byte) if sender == self._rank else self.receive(byte))

    # The issuing thread.

    def _init(self, unique_id: bytes, deadline_s: float) -> None:
        self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        self._handle = self._library.begin_init(unique_id, self._rank)
        while self._library.in_progress(self._handle):
            if time.monotonic() > deadline_s or self._aborting:
                raise TransferTimeout("the other rank did not open its communicator in time")
            pause(_INIT_PAUSE_S)

    def _issue(
        self,
        begin: Callable[[int, int, torch.Tensor, int], None],
        buffer: torch.Tensor,
        done: asyncio.Future[None],
    ) -> None:
        try:
            if self._aborting:
                raise PeerLost(_ABORT_LEAVES)
            assert self._stream is not None
            begin(self._handle, 1 - self._rank, buffer, self._stream.cuda_stream)
            while self._library.in_progress(self._handle):
                if self._aborting:
                    raise PeerLost(_ABORT_LEAVES)
                pause(_CALL_PAUSE_S)
            event = self._stream.record_event()
        except NcclError as error:
            self._answer(done, PeerLost(str(error)))
        except PeerLost as error:
            self._answer(done, error)
        else:
            self._waiter.submit(self._await, event, buffer, done)

    def _abort(self) -> None:
        if self._handle:
            handle, self._handle = self._handle, 0
            self._library.abort(handle)
        if self._stream is not None:
            self._stream.synchronize()  # the kernels have seen the abort and are gone

    # The waiting thread.

    def _await(self, event: torch.cuda.Event, _: torch.Tensor, done: asyncio.Future[None]) -> None:
        """Whether a transfer that an abort overtook was complete is unknown, so it counts as lost."""
        event.synchronize()
        self._answer(done, PeerLost(_ABORT_LEAVES) if self._aborting else None)

    def _answer(self, done: asyncio.Future[None], error: PeerLost | None) -> None:
        self._loop.call_soon_threadsafe(_settle, done, error)

    def _shut_down(self) -> None:
        """Both threads end; what they answered is on the loop before this returns."""
        self._issuer.shutdown(wait=True)
        self._waiter.shutdown(wait=True)


def _begin_thread(device: torch.device) -> None:
    torch.cuda.set_device(device)
    allow_short_sleeps()


def _settle(done: asyncio.Future[None], error: PeerLost | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
