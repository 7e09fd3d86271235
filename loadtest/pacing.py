"""The two paces that are no arrival process: a trace's own times, and a closed loop. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import InvalidArgument
from loadtest.traces import Trace


@dataclass(frozen=True, slots=True)
class TraceTimes:
    """Requests are due when the trace's rows were, at `rate_scale` times the trace's rate."""

    trace: Trace
    rate_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate_scale) and self.rate_scale > 0):
            raise InvalidArgument("rate scale", self.rate_scale, "above 0")

    def due_times_s(self, seed: int) -> Iterator[float]:
        """Due times in seconds; the first is 0. The seed changes nothing."""
        return (row.at_s / self.rate_scale for row in self.trace.rows)

    def describe(self) -> str:
        """In words, for the report."""
        return ", ".join(filter(None, ("the trace's own times", self.describe_scale(), self._describe_spread())))

    def describe_scale(self) -> str:
        """What the user scaled; empty if nothing."""
        return f"rate × {self.rate_scale:g}" if self.rate_scale != 1.0 else ""

    def _describe_spread(self) -> str:
        num_spread = self.trace.num_spread
        rows = f"{num_spread} of {len(self.trace.rows)} rows"
        return f"{rows} shared a timestamp and were spread up to the next" if num_spread else ""


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many requests in flight: the next is due when one ends. Its latencies do not show how a queue would grow."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InvalidArgument("concurrency", self.concurrency, "at least 1")

    def due_times_s(self, seed: int) -> Iterator[float]:
        """Zeros without end: the generator knows when there is room."""
        return itertools.repeat(0.0)

    def describe(self) -> str:
        """In words, for the report."""
        return f"closed loop, {self.concurrency} in flight"

    def describe_scale(self) -> str:
        """A closed loop has no rate to scale."""
        return ""
