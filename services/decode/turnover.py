"""How fast decode rows come free, from how long sequences stayed in theirs, and how long a step takes. Pure.

A time that something takes says what it says also of a worker that idles between; a rate would not.
"""

from __future__ import annotations

LEAST_WEIGHT = 0.05  # of the newest sequence in the mean
STEP_WEIGHT = 0.1  # of the newest step


class RowTurnover:
    """Times of stay, averaged over the last few dozen sequences; of steps, over the last few."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._num_left = 0
        self._last_result_s: float | None = None  # if a step was under way then
        self.step_s = 0.0

    def stepped(self, now_s: float, is_busy: bool) -> None:
        """A step's result is here; `is_busy`: another one is under way."""
        if self._last_result_s is not None:
            gap_s = now_s - self._last_result_s
            self.step_s += (gap_s - self.step_s) * (STEP_WEIGHT if self.step_s else 1.0)
        self._last_result_s = now_s if is_busy else None

    def left(self, stayed_s: float) -> None:
        """A sequence left its row."""
        self._num_left += 1
        self._mean_s += (stayed_s - self._mean_s) * max(LEAST_WEIGHT, 1.0 / self._num_left)

    def row_s(self, num_at_once: int) -> float:
        """Mean time until another of so many rows comes free while all are taken; 0 while nothing is known."""
        return self._mean_s / max(1, num_at_once)
