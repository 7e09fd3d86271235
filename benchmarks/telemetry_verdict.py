"""Whether telemetry keeps its limit, or whether this machine cannot tell: a pure judgement of costs measured in rounds.

A cost is a share of the time of a step. The control is what two deployments without telemetry cost each other: nothing
in truth, so whatever is seen of it is what the machine cannot tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

MAX_COST = 0.01  # of a step's time
MIN_ROUNDS = 6  # of fewer, no interval holds the median in 95 of 100 cases
_MAX_MISSES = 0.05


class Verdict(Enum):
    """The value is the exit status."""

    KEPT = 0
    MISSED = 1
    CANNOT_TELL = 3  # 2 is for wrong arguments


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the true median is, in at least 95 of 100 cases."""

    low: float
    high: float


def interval_of_median(values: Sequence[float]) -> Interval:
    """From order statistics, whatever the distribution: how often so few of them would be on one side of the median."""
    if len(values) < MIN_ROUNDS:
        return Interval(-math.inf, math.inf)
    num = len(values)
    num_outside, chance = 0, 2 * 0.5**num  # values left out at each end, and how often the median is among those
    while chance <= _MAX_MISSES:
        num_outside += 1
        chance += 2 * math.comb(num, num_outside) * 0.5**num
    in_order = sorted(values)
    return Interval(in_order[num_outside - 1], in_order[num - num_outside])


def spread_of(control: Sequence[float]) -> float:
    """How far apart two deployments may seem that do not differ."""
    interval = interval_of_median(control)
    return max(abs(interval.low), abs(interval.high))


def judge(costs: Sequence[float], control: Sequence[float], max_cost: float = MAX_COST) -> Verdict:
    """Kept: cost and control are below the limit. Missed: the cost is above it by more than the control's spread."""
    interval, spread = interval_of_median(costs), spread_of(control)
    if interval.low - spread > max_cost:
        return Verdict.MISSED
    if interval.high <= max_cost and spread <= max_cost:
        return Verdict.KEPT
    return Verdict.CANNOT_TELL
