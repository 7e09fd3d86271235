"""The rate of the last few transfers: their bytes, over the time that each took. Any thread may read."""

from __future__ import annotations

from collections import deque

NUM_TRANSFERS = 32


class RecentRate:
    """Bytes per second over the last transfers; 0 before the first."""

    def __init__(self, num_transfers: int = NUM_TRANSFERS) -> None:
        self._transfers: deque[tuple[int, int]] = deque(maxlen=num_transfers)

    def add(self, num_bytes: int, duration_ns: int) -> None:
        """One transfer is over."""
        self._transfers.append((num_bytes, duration_ns))

    @property
    def bytes_per_s(self) -> float:
        transfers = self._transfers.copy()
        total_ns = sum(duration_ns for _, duration_ns in transfers)
        return sum(num_bytes for num_bytes, _ in transfers) / total_ns * 1e9 if total_ns else 0.0
