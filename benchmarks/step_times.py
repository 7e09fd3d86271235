"""When steps began and ended on a device, by events on its stream, and what that says about a run of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


class Moment:
    """When the device passes this point of its stream; on a CPU, which computes at once, the host's time."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._host_s = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def ms_since(self, earlier: Moment) -> float:
        """Milliseconds; both must have passed."""
        if self._event is None or earlier._event is None:
            return (self._host_s - earlier._host_s) * 1e3
        return float(earlier._event.elapsed_time(self._event))


@dataclass(slots=True)
class StepTimes:
    """Of consecutive steps, milliseconds: from end to end, and of that the time in which no step was computed."""

    periods_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # end of the step before to the step's begin
    num_rows: list[int] = field(default_factory=list)
    num_joins: list[int] = field(default_factory=list)  # sequences whose first step it is

    def add_run(
        self, moments: Sequence[tuple[Moment, Moment]], rows: Sequence[int], joins: Sequence[int], num_skipped: int
    ) -> None:
        """Begin and end of each step of a run, its rows and joins; the first `num_skipped` (1 or more) do not count."""
        assert num_skipped >= 1
        assert len(moments) == len(rows) == len(joins)
        for step in range(num_skipped, len(moments)):
            (_, end_before), (begin, end) = moments[step - 1], moments[step]
            self.periods_ms.append(end.ms_since(end_before))
            self.gaps_ms.append(begin.ms_since(end_before))
        self.num_rows += rows[num_skipped:]
        self.num_joins += joins[num_skipped:]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a table shows of `StepTimes`; milliseconds."""

    num_steps: int
    rows: float  # mean
    joins_per_s: float
    median_ms: float
    p99_ms: float
    max_ms: float
    p99_over_median: float
    idle: float  # share of the time that lies between steps
    max_gap_ms: float
    joining_median_ms: float | None  # of steps before which somebody joined


def summarize(times: StepTimes) -> Summary:
    """Raises `ValueError` for fewer than two steps."""
    periods = times.periods_ms
    if len(periods) < 2:
        raise ValueError(f"{len(periods)} steps say nothing")
    median_ms, p99_ms = statistics.median(periods), percentile(periods, 0.99)
    joining = [period for period, joins in zip(periods, times.num_joins, strict=True) if joins]
    return Summary(
        num_steps=len(periods),
        rows=statistics.fmean(times.num_rows),
        joins_per_s=sum(times.num_joins) / sum(periods) * 1e3,
        median_ms=median_ms,
        p99_ms=p99_ms,
        max_ms=max(periods),
        p99_over_median=p99_ms / median_ms,
        idle=sum(times.gaps_ms) / sum(periods),
        max_gap_ms=max(times.gaps_ms),
        joining_median_ms=statistics.median(joining) if joining else None,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed: of fewer than 100 and 0.99 the largest."""
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)  # rounded up
    return ordered[max(0, int(rank) - 1)]
