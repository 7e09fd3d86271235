"""The life of one posted receive, shared by all backends; it knows no wire.

POSTED ──begin──► ARRIVING ──complete──► COMPLETE        bytes are only written while ARRIVING
   │                  └─────fail──────► FAILED           (Truncated is found before a byte is written)
   ├──fail──► FAILED                                     the connection went away
   └──cancel─► CANCELLED                                 nothing had arrived: the tag now matches nothing
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable

import torch

from common.errors import Cancelled, PeerLost, TransferError
from common.transport.base import CancelOutcome


class ReceiveState(enum.Enum):
    """See the drawing above."""

    POSTED = enum.auto()
    ARRIVING = enum.auto()
    COMPLETE = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()


class Receive:
    """A `PostedReceive`. The backend drives `begin`, `complete` and `fail`; `withdraw` takes its tag back."""

    def __init__(self, tag: int, buffer: torch.Tensor, withdraw: Callable[[int], None]) -> None:
        self.buffer = buffer  # uint8 [num_bytes]
        self.state = ReceiveState.POSTED
        self.arrived_ns = 0  # of `time.monotonic_ns`, when the first byte could be written; 0: not yet
        self._tag = tag
        self._withdraw = withdraw
        self._error: TransferError | Cancelled | None = None
        self._peer_lost = False
        self._settled = asyncio.Event()  # the transport is done with the buffer
        self._answered = asyncio.Event()  # `wait` has its answer

    @property
    def tag(self) -> int:
        return self._tag

    def begin(self) -> None:
        """The message is here and fits: bytes may be written from now on."""
        assert self.state is ReceiveState.POSTED
        self.state = ReceiveState.ARRIVING
        self.arrived_ns = time.monotonic_ns()

    def complete(self) -> None:
        """All bytes are in the buffer, and none will follow."""
        assert self.state is ReceiveState.ARRIVING
        self.state = ReceiveState.COMPLETE
        self._settle()

    def fail(self, error: TransferError) -> None:
        """No byte is written any more, and the buffer's content is undefined."""
        assert self.state in (ReceiveState.POSTED, ReceiveState.ARRIVING)
        self.state = ReceiveState.FAILED
        self._error = self._error or error
        self._peer_lost = isinstance(error, PeerLost)
        self._settle()

    async def wait(self) -> None:
        await self._answered.wait()
        if self._error is not None:
            raise self._error

    async def cancel(self, timeout_s: float) -> CancelOutcome:
        if self.state is ReceiveState.POSTED:
            self._withdraw(self._tag)
            self.state = ReceiveState.CANCELLED
            self._error = Cancelled(f"receive {self._tag:#x} was taken back")
            self._settle()
        elif self.state is ReceiveState.ARRIVING:
            await self._cancel_arriving(timeout_s)
        return self._outcome()

    async def _cancel_arriving(self, timeout_s: float) -> None:
        if self._error is None:
            self._error = Cancelled(f"receive {self._tag:#x} was taken back while it arrived")
            self._answered.set()
        try:
            await asyncio.wait_for(self._settled.wait(), timeout_s)
        except TimeoutError:
            return

    def _outcome(self) -> CancelOutcome:
        if self.state is ReceiveState.ARRIVING:
            return CancelOutcome.IN_DOUBT
        if self.state is ReceiveState.FAILED and self._peer_lost:
            return CancelOutcome.PEER_LOST
        return CancelOutcome.DRAINED

    def _settle(self) -> None:
        self._settled.set()
        self._answered.set()


class MatchList:
    """The posted receives of one connection by tag. A tag leaves when it matches, fails or is cancelled."""

    def __init__(self) -> None:
        self._posted: dict[int, Receive] = {}

    def __len__(self) -> int:
        return len(self._posted)

    def post(self, tag: int, buffer: torch.Tensor) -> Receive:
        check_buffer(buffer)
        check_tag(tag)
        if tag in self._posted:
            raise ValueError(f"tag {tag:#x} is already posted on this connection")
        receive = Receive(tag, buffer, self.withdraw)
        self._posted[tag] = receive
        return receive

    def take(self, tag: int) -> Receive | None:
        """The receive of this tag, no longer posted; None: the message is stale."""
        return self._posted.pop(tag, None)

    def withdraw(self, tag: int) -> None:
        del self._posted[tag]

    def fail_all(self, error: TransferError) -> None:
        posted, self._posted = self._posted, {}
        for receive in posted.values():
            receive.fail(error)


def check_buffer(buffer: torch.Tensor) -> None:
    """Raise `ValueError` unless it is a contiguous uint8 tensor of shape [num_bytes], num_bytes > 0."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() == 0 or not buffer.is_contiguous():
        raise ValueError(
            f"a transport buffer is contiguous uint8 [num_bytes > 0], not {buffer.dtype} {list(buffer.shape)}"
        )


def check_tag(tag: int) -> None:
    """Raise `ValueError` unless the tag fits in 64 bits."""
    if not 0 <= tag < 1 << 64:
        raise ValueError(f"a tag is an unsigned 64-bit number, not {tag}")
