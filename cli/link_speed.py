"""How fast a worker's link is now and which lane it takes, from the differences between its statuses. Pure."""

from __future__ import annotations

from collections import deque

from baton.v1 import worker_pb2

from common.telemetry.lanes import COUNTER_PREFIX

WINDOW_S = 5.0
_MIN_WATCH_S = 0.2
_BYTE_COUNTERS = ("bytes_shipped", "bytes_verified")  # of a prefill worker; of a decode worker


class LinkSpeed:
    """One worker's. Statuses come in order of time; one that is older than the window still says where it began."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()
        self._incarnation = ""
        self._since_s = 0.0

    def add(self, status: worker_pb2.WorkerStatus, now_s: float) -> None:
        """What the worker says at this time."""
        if status.incarnation != self._incarnation:
            self._incarnation = status.incarnation
            self._since_s = now_s
            self._seen.clear()
        self._seen.append((now_s, sum(status.counters.get(name, 0) for name in _BYTE_COUNTERS)))

    def bytes_per_s(self, now_s: float) -> float | None:
        """Over the window that ends now; None if the worker has not been watched for long enough."""
        if now_s - self._since_s < _MIN_WATCH_S:
            return None
        begin_s = now_s - self._window_s
        while len(self._seen) > 1 and self._seen[1][0] <= begin_s:
            self._seen.popleft()
        if len(self._seen) < 2:
            return 0.0
        first_s, first_bytes = self._seen[0]
        return (self._seen[-1][1] - first_bytes) / (now_s - max(first_s, begin_s))


def lane_of(status: worker_pb2.WorkerStatus) -> str:
    """The lane that most chunks took; empty if none was sent, or by a worker that only receives."""
    lanes = {
        name.removeprefix(COUNTER_PREFIX): count
        for name, count in status.counters.items()
        if name.startswith(COUNTER_PREFIX) and count
    }
    return max(lanes, key=lambda lane: lanes[lane], default="")
