"""One UCX worker on one asyncio event loop: progress, completion of requests, and arrival of messages.

Everything runs on the loop's thread, without UCX's own threads: `event` sleeps on the worker's file descriptor and
costs nothing when idle; with `polling` a `LoopWatch` looks at it while an operation is under way (for GPUs, where the
end of a copy raises no event); a receive that still waits for its message is none. It knows requests and messages, but
no peers.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from ucxx._lib.arr import Array
from ucxx._lib.libucxx import (
    Feature,
    TagProbeResult,
    UCXContext,
    UCXError,
    UCXRequest,
    UCXWorker,
    UCXXTag,
    UCXXTagMask,
)

from common.short_sleep import Look, LoopWatch, loop_watch
from common.transport.ucx_devices import network_devices

TURN_BUDGET_S = 0.0002  # how long one turn may keep the event loop
HEARTBEAT_S = 0.5  # a turn is never later than this, should UCX raise no event
_ROUNDS_PER_SCAN = 16
_ANY_TAG = UCXXTag(0), UCXXTagMask(0)
_OPTIONS = {
    "KEEPALIVE_INTERVAL": "500ms",  # the default of 20 s would hide a dead peer
    "TCP_KEEPIDLE": "2s",
    "TCP_KEEPINTVL": "1s",
    "TCP_KEEPCNT": "3",
}


class Progress(enum.Enum):
    """How a worker is progressed."""

    EVENT = "event"
    POLLING = "polling"


@dataclass(slots=True, eq=False)
class _Operation:
    request: UCXRequest
    memory: object  # UCX borrows the buffer and holds no reference to it
    on_done: Callable[[UCXError | None], None]


class LoopWorker:
    """Drives a UCX worker on the running loop. `on_message` takes every message that has arrived, in order.

    Raises `FailedPrecondition` if UCX finds no network device.
    """

    def __init__(
        self,
        progress: Progress,
        on_message: Callable[[TagProbeResult], None],
        device_options: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.context = UCXContext({**_OPTIONS, **device_options}, (Feature.TAG, Feature.STREAM, Feature.WAKEUP))
        self.devices = network_devices(self.context)
        self.ucx = UCXWorker(self.context)
        self._on_message = on_message
        self._watch: LoopWatch | None = loop_watch() if progress is Progress.POLLING else None
        self._operations: list[_Operation] = []
        self._deferred: list[Callable[[], None]] = []
        self._scheduled = False
        self._looking = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self.ucx.init_blocking_progress_mode()
        self._event_fd: int = self.ucx.epoll_file_descriptor
        self._loop.add_reader(self._event_fd, self._on_event)
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat)
        self.kick()

    @property
    def num_operations(self) -> int:
        return len(self._operations)

    def track(self, request: UCXRequest, memory: object, on_done: Callable[[UCXError | None], None]) -> None:
        """Hold `memory` until the request is complete, then say how it ended."""
        self._operations.append(_Operation(request, memory, on_done))
        self.kick()

    def finished(self, request: UCXRequest, memory: object) -> asyncio.Future[UCXError | None]:
        """Track a request; the future says how it ended. Cancelling the future leaves the request under way."""
        done: asyncio.Future[UCXError | None] = self._loop.create_future()
        self.track(request, memory, lambda error: None if done.cancelled() else done.set_result(error))
        return done

    def discard(self, message: TagProbeResult) -> None:
        """Consume a message without writing one of its bytes: UCX frees it as truncated, and its sender goes on."""
        nothing = Array(bytearray())
        request = self.ucx.tag_recv_with_handle(nothing, message)
        self.track(request, (nothing, message), lambda _: None)

    def receive(
        self, message: TagProbeResult, buffer: torch.Tensor, on_done: Callable[[UCXError | None], None]
    ) -> None:
        """Receive an arrived message into uint8 [message.length]."""
        assert message.length == buffer.numel()
        memory = as_array(buffer)
        self.track(self.ucx.tag_recv_with_handle(memory, message), (memory, message), on_done)

    def defer(self, action: Callable[[], None]) -> None:
        """Run after the arrived messages were taken: safe to call from inside a UCX callback."""
        self._deferred.append(action)
        self.kick()

    def kick(self) -> None:
        """Take a turn soon: UCX has something to do that its file descriptor does not announce."""
        if self._closed or self._looking:  # a look goes on until there is nothing left to do
            return
        if self._watch is not None:
            self._watch.add(self._look)
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def close(self) -> None:
        """Stop. Operations under way are abandoned with their memory held until UCX has let go of it."""
        self._closed = True
        self._heartbeat.cancel()
        self._loop.remove_reader(self._event_fd)
        if self._operations:
            self.ucx.cancel_inflight_requests()
            self.ucx.progress()
        self._deferred.clear()

    def _beat(self) -> None:
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat)
        if self._watch is not None:
            self._wake(self._watch)
        else:
            self.kick()

    def _wake(self, watch: LoopWatch) -> None:
        """Nothing that it did not see for itself, if it is looking."""
        if not watch.watches(self._look):
            watch.add(self._look)

    def _on_event(self) -> None:
        if self._watch is not None:
            self._wake(self._watch)
        elif self._look() is not Look.OVER:
            self.kick()

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        if self._look() is not Look.OVER:
            self.kick()

    def _look(self) -> Look:
        if self._closed:
            return Look.OVER
        self._looking = True
        try:
            return self._advance_until_still()
        finally:
            self._looking = False

    def _advance_until_still(self) -> Look:
        """Or until the budget is spent. Once it is over, the descriptor announces what comes."""
        spent_at = time.monotonic() + TURN_BUDGET_S
        moved = False
        while True:
            if self._advance():
                moved = True
            elif self._watch is not None and self._operations:
                return Look.MOVED if moved else Look.STILL
            elif self.ucx.arm():
                return Look.OVER
            if time.monotonic() >= spent_at:
                return Look.MOVED

    def _advance(self) -> bool:
        """Whether anything moved."""
        moved = self._progress_some()
        moved |= self._take_messages()
        moved |= self._reap()
        return self._run_deferred() or moved

    def _progress_some(self) -> bool:
        for num_moved in range(_ROUNDS_PER_SCAN):
            if not self.ucx.progress_once():
                return num_moved > 0
        return True

    def _take_messages(self) -> bool:
        taken = False
        while (message := self.ucx.tag_probe(*_ANY_TAG, remove=True)).matched:
            self._on_message(message)
            taken = True
        return taken

    def _reap(self) -> bool:
        done = [operation for operation in self._operations if operation.request.completed]
        if not done:
            return False
        ended = set(map(id, done))
        self._operations = [operation for operation in self._operations if id(operation) not in ended]
        for operation in done:
            operation.on_done(_error_of(operation.request))
        return True

    def _run_deferred(self) -> bool:
        actions, self._deferred = self._deferred, []
        for action in actions:
            action()
        return bool(actions)


def as_array(buffer: torch.Tensor) -> Array:
    """UCX's view of a contiguous uint8 tensor, which it keeps."""
    return Array(buffer.numpy() if buffer.device.type == "cpu" else _DeviceBytes(buffer))


class _DeviceBytes:
    """Says where a GPU's uint8 tensor [num_bytes] lies, as the tensor would, without asking torch for all of it."""

    __slots__ = ("__cuda_array_interface__", "_buffer")

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self.__cuda_array_interface__ = {
            "data": (buffer.data_ptr(), False),
            "shape": (buffer.numel(),),
            "strides": None,
            "typestr": "|u1",
            "version": 2,
        }


def _error_of(request: UCXRequest) -> UCXError | None:
    try:
        request.check_error()
    except UCXError as error:
        return error
    return None
