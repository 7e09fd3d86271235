"""When steps begin and end, as a front sees it: gaps between results, and time in which ranks had work but no plan.

One reading of the clock per step and per plan. Knows neither plans nor sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from common.telemetry.histogram import Histogram


class StepClock:
    """`add_idle_ns` is told of idle time once it is over; `gaps`, in seconds, of results that follow each other."""

    def __init__(
        self,
        add_idle_ns: Callable[[int], None],
        gaps: Histogram | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._add_idle_ns = add_idle_ns
        self._gaps = gaps
        self._now_ns = now_ns
        self._last_result_ns = 0
        self._idle_since_ns = 0

    def submitted(self) -> None:
        """The ranks got a plan."""
        if self._idle_since_ns:
            self._add_idle_ns(self._now_ns() - self._idle_since_ns)
            self._idle_since_ns = 0

    def answered(self, num_in_flight: int, has_work: bool) -> None:
        """A result came. `num_in_flight` plans are left; `has_work`: whether there is something to plan."""
        now_ns = self._now_ns()
        if self._gaps is not None and self._last_result_ns:
            self._gaps.observe((now_ns - self._last_result_ns) * 1e-9)
        self._last_result_ns = now_ns if has_work or num_in_flight else 0
        self._idle_since_ns = now_ns if has_work and not num_in_flight else 0

    def rest(self) -> None:
        """Nothing is to be done, or the ranks are gone: what passes until the next plan is nobody's."""
        self._last_result_ns = self._idle_since_ns = 0
