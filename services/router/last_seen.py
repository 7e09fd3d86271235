"""What a worker said last, kept when it is heard no more: which life that was, and if it is coming back. Pure."""

from __future__ import annotations

import math

from baton.v1 import worker_pb2

from services.router.moves import WorkerLife

RANKS_LOST = "ranks_lost"  # the counter of both kinds of workers


class LastSeen:
    """`status` is None while it is not known."""

    def __init__(self) -> None:
        self.status: worker_pb2.WorkerStatus | None = None
        self._last: worker_pb2.WorkerStatus | None = None
        self._was_ready_s = -math.inf  # until when, while it is not

    @property
    def is_draining(self) -> bool:
        """Whether it drains, or did when it was heard last."""
        return self._last is not None and self._last.state == worker_pb2.WORKER_STATE_DRAINING

    def note(self, status: worker_pb2.WorkerStatus | None, now_s: float) -> None:
        """Its status is this from now on; None: it is not known."""
        was_ready = self.status is not None and self.status.state == worker_pb2.WORKER_STATE_READY
        if was_ready and (status is None or status.state != worker_pb2.WORKER_STATE_READY):
            self._was_ready_s = now_s
        self.status = status
        self._last = status or self._last

    def life(self, worker: str) -> WorkerLife | None:
        """The life that it lives; None while its status is not known."""
        status = self.status
        if status is None:
            return None
        return WorkerLife(worker, status.incarnation, status.counters.get(RANKS_LOST, 0))

    def starts_until_s(self, num_tokens: int, restart_timeout_s: float) -> float:
        """Until when it counts as on its way to take a sequence of so many tokens: for ever while it says that it
        starts, for a while after it was ready; minus infinity if it is not."""
        last = self._last
        if last is None or (last.max_sequence_tokens and num_tokens > last.max_sequence_tokens):
            return -math.inf
        if self.status is None or self.status.state == worker_pb2.WORKER_STATE_DRAINING:
            return self._was_ready_s + restart_timeout_s
        return math.inf if self.status.state == worker_pb2.WORKER_STATE_STARTING else -math.inf
