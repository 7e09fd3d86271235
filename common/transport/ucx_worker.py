"""One UCX worker on one asyncio event loop: progress, completion of requests, and arrival of messages.

Everything runs on the loop's thread, without UCX's own threads: `event` sleeps on the worker's file descriptor and
costs nothing when idle; `polling` looks again and again while an operation is under way (for GPUs), with pauses in
which other threads have the interpreter. It knows requests and messages, but no peers.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

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

from common.short_sleep import allow_short_sleeps, pause

TURN_BUDGET_S = 0.001  # how long one turn may keep the event loop
POLL_PAUSE_S = 20e-6  # a copy of 32 MiB over NVLink takes 90 µs
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
    """Drives a UCX worker on the running loop. `on_message` takes every message that has arrived, in order."""

    def __init__(self, progress: Progress, on_message: Callable[[TagProbeResult], None]) -> None:
        self.context = UCXContext(_OPTIONS, (Feature.TAG, Feature.STREAM, Feature.WAKEUP))
        self.ucx = UCXWorker(self.context)
        self._on_message = on_message
        self._polling = progress is Progress.POLLING
        self._operations: list[_Operation] = []
        self._deferred: list[Callable[[], None]] = []
        self._scheduled = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        if self._polling:
            allow_short_sleeps()
        self.ucx.init_blocking_progress_mode()
        self._event_fd: int = self.ucx.epoll_file_descriptor
        self._loop.add_reader(self._event_fd, self._turn)
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
        if not self._scheduled and not self._closed:
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
        self._turn()

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        if not self._closed:
            self._turn()

    def _turn(self) -> None:
        """Progress until nothing moves or the budget is spent, then sleep on the descriptor or come again."""
        spent_at = time.monotonic() + TURN_BUDGET_S
        moving = True
        while moving and time.monotonic() < spent_at:
            moving = self._progress_some()
            self._take_messages()
            self._reap()
            self._run_deferred()
        if self._polling and self._operations and not moving and not self._deferred:
            pause(POLL_PAUSE_S)
            self.kick()
        elif moving or self._deferred or not self.ucx.arm():
            self.kick()

    def _progress_some(self) -> bool:
        return all(self.ucx.progress_once() for _ in range(_ROUNDS_PER_SCAN))

    def _take_messages(self) -> None:
        while (message := self.ucx.tag_probe(*_ANY_TAG, remove=True)).matched:
            self._on_message(message)

    def _reap(self) -> None:
        operations, self._operations = self._operations, []
        done: list[_Operation] = []
        for operation in operations:
            (done if operation.request.completed else self._operations).append(operation)
        for operation in done:
            operation.on_done(_error_of(operation.request))

    def _run_deferred(self) -> None:
        actions, self._deferred = self._deferred, []
        for action in actions:
            action()


def as_array(buffer: torch.Tensor) -> Array:
    """UCX's view of a contiguous uint8 tensor; the tensor must outlive it."""
    return Array(buffer.numpy() if buffer.device.type == "cpu" else buffer)


def _error_of(request: UCXRequest) -> UCXError | None:
    try:
        request.check_error()
    except UCXError as error:
        return error
    return None
