"""One NCCL communicator of two ranks, used from an event loop: queued transfers, and an abort that ends them.

NCCL matches by order alone, so both ends must queue the same transfers in the same order; `nccl_connection` sees to
that. No call of NCCL blocks, so all are made on the loop's thread, where a `LoopWatch` looks what has become of them;
only the opening and the abort have threads. A transfer is queued while the one before it runs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from common.errors import PeerLost, TransferTimeout
from common.short_sleep import Look, loop_watch, pause
from common.transport.cuda_device import DeviceStream, Mark
from common.transport.nccl_library import NcclError, NcclLibrary, nccl_library

_INIT_PAUSE_S: Final = 0.001  # between looks at a communicator that is being opened
_ABORT_LEAVES: Final = "the communicator was aborted"


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


@dataclass(slots=True, eq=False)
class _Transfer:
    begin: Callable[[int, int, torch.Tensor, int], None]
    buffer: torch.Tensor  # uint8 [num_bytes]
    done: asyncio.Future[None]
    mark: Mark | None = None  # once NCCL has queued it

    def end(self, error: PeerLost | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class NcclCommunicator:
    """See `Communicator`. Made by `open`."""

    def __init__(self, library: NcclLibrary, stream: DeviceStream, device: torch.device, rank: int) -> None:
        self._library = library
        self._stream = stream
        self._device = device
        self._rank = rank
        self._handle = 0
        self._loop = asyncio.get_running_loop()
        self._watch = loop_watch()
        self._waiting: deque[_Transfer] = deque()
        self._issuing: _Transfer | None = None  # NCCL works on the call
        self._running: deque[_Transfer] = deque()  # on the stream, in this order
        self._aborting = False
        self._opening: asyncio.Future[None] | None = None
        self._aborted: asyncio.Future[None] | None = None

    @classmethod
    async def open(
        cls, library: NcclLibrary, device: torch.device, unique_id: bytes, rank: int, timeout_s: float
    ) -> NcclCommunicator:
        """See `CommunicatorOpener.open`."""
        made = cls(library, DeviceStream(device), device, rank)
        await made.meet(unique_id, timeout_s)
        return made

    async def meet(self, unique_id: bytes, timeout_s: float) -> None:
        """Open together with the other rank, and connect. Aborted if it raises: `PeerLost` or `TransferTimeout`."""
        try:
            self._opening = self._loop.run_in_executor(None, self._init, unique_id, time.monotonic() + timeout_s)
            await asyncio.shield(self._opening)
            await self._warm_up()
        except NcclError as error:
            await self.abort()
            raise PeerLost(str(error)) from error
        except BaseException:
            await self.abort()
            raise

    def send(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        return self._queue(self._library.begin_send, buffer)

    def receive(self, buffer: torch.Tensor) -> asyncio.Future[None]:
        return self._queue(self._library.begin_receive, buffer)

    async def abort(self) -> None:
        self._aborting = True  # from here on the loop's thread does not touch the communicator
        if self._aborted is None:
            self._aborted = asyncio.ensure_future(self._abort())
        await asyncio.shield(self._aborted)

    def _queue(
        self, begin: Callable[[int, int, torch.Tensor, int], None], buffer: torch.Tensor
    ) -> asyncio.Future[None]:
        assert buffer.device == self._device
        transfer = _Transfer(begin, buffer, self._loop.create_future())
        if self._aborting:
            transfer.end(PeerLost(_ABORT_LEAVES))
        else:
            self._waiting.append(transfer)
            self._watch.add(self._look)
        return transfer.done

    async def _warm_up(self) -> None:
        """NCCL connects two ranks when they first send to each other; that is slow, so it happens here."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        for sender in (0, 1):
            await (self.send(byte) if sender == self._rank else self.receive(byte))

    def _look(self) -> Look:
        if self._aborting:
            return Look.OVER
        moved = self._end_complete()
        moved |= self._issue_waiting()
        if not self._running and self._issuing is None:
            return Look.OVER
        return Look.MOVED if moved else Look.STILL

    def _end_complete(self) -> bool:
        ended = False
        while self._running:
            transfer = self._running[0]
            assert transfer.mark is not None
            error = None
            try:
                if not transfer.mark.query():
                    break
            except RuntimeError as failure:  # the device's
                error = PeerLost(str(failure))
            self._running.popleft().end(error)
            ended = True
        return ended

    def _issue_waiting(self) -> bool:
        """Hand over one transfer after the other, until NCCL still works on a call."""
        issued = False
        while self._issuing is not None or self._waiting:
            transfer = self._issuing or self._waiting.popleft()
            try:
                if self._issuing is None:
                    with self._stream.current():
                        transfer.begin(self._handle, 1 - self._rank, transfer.buffer, self._stream.handle)
                if self._library.in_progress(self._handle):
                    self._issuing = transfer
                    break
                transfer.mark = self._stream.mark()
                self._running.append(transfer)
            except NcclError as error:
                transfer.end(PeerLost(str(error)))
            self._issuing = None
            issued = True
        return issued

    async def _abort(self) -> None:
        """Whether a transfer that is overtaken was complete is unknown, so it counts as lost."""
        if self._opening is not None:
            await asyncio.wait({self._opening})  # it sees the abort
            self._opening.exception()  # has been told to whoever opens, if anybody still does
        await self._loop.run_in_executor(None, self._abort_communicator)
        issuing = [] if self._issuing is None else [self._issuing]
        for transfer in (*self._running, *issuing, *self._waiting):
            transfer.end(PeerLost(_ABORT_LEAVES))
        self._running.clear()
        self._waiting.clear()
        self._issuing = None

    # In threads of their own.

    def _init(self, unique_id: bytes, deadline_s: float) -> None:
        with self._stream.current():
            self._handle = self._library.begin_init(unique_id, self._rank)
            while self._library.in_progress(self._handle):
                if time.monotonic() > deadline_s or self._aborting:
                    raise TransferTimeout("the other rank did not open its communicator in time")
                pause(_INIT_PAUSE_S)

    def _abort_communicator(self) -> None:
        with self._stream.current():
            if self._handle:
                handle, self._handle = self._handle, 0
                self._library.abort(handle)
            self._stream.synchronize()  # the kernels have seen the abort and are gone
