"""What is plotted, as numbers: distributions, tails, counts over time, in as few points as the eye needs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.measured import Floats
from loadtest.record import PoolSample, RequestRecord


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A step function: from `x[i]` on it has the value `y[i]`; before `x[0]`, the value `before`."""

    name: str
    x: Floats  # rising
    y: Floats
    before: float = 0.0

    def at(self, x: float) -> float:
        """Its value at one point."""
        index = int(np.searchsorted(self.x, x, side="right")) - 1
        return self.before if index < 0 else float(self.y[index])


def share_within(name: str, values: Floats, num_all: int | None = None) -> Curve:
    """The share of values that are at most x, the cumulative distribution; of `num_all`, if some have no value."""
    x = np.sort(values)
    return Curve(name, x, np.arange(1, len(x) + 1) / (num_all or max(1, len(x))))


def share_beyond(name: str, values: Floats) -> Curve:
    """The share of values above x; ends before the maximum, above which there is none."""
    x = np.sort(values)
    num_below_max = int(np.searchsorted(x, x[-1])) if x.size else 0
    return Curve(name, x[:num_below_max], 1 - np.arange(1, num_below_max + 1) / max(1, x.size), before=1.0)


def in_flight(name: str, records: Sequence[RequestRecord]) -> Curve:
    """How many requests were under way, sent and not ended, at each moment of the run."""
    moments_s = np.array([record.sent_s for record in records] + [record.ended_s for record in records])
    steps = np.repeat((1.0, -1.0), len(records))
    order = np.argsort(moments_s, kind="stable")
    return Curve(name, moments_s[order], np.cumsum(steps[order]))


def pools(samples: Sequence[PoolSample]) -> tuple[Curve, ...]:
    """The four queues and batches of the target over time."""
    moments_s = np.array([sample.at_s for sample in samples], np.float64)
    columns = {
        "waiting for prefill": [sample.num_waiting_prefill for sample in samples],
        "in prefill": [sample.num_running_prefill for sample in samples],
        "waiting to decode": [sample.num_waiting_decode for sample in samples],
        "decode batch": [sample.num_running_decode for sample in samples],
    }
    return tuple(Curve(name, moments_s, np.array(column, np.float64)) for name, column in columns.items())


def thin_distribution(curve: Curve, max_points: int) -> Curve:
    """Half of the points evenly over the ranks, half ever denser towards the last one: the tail keeps its shape."""
    num = len(curve.x)
    if num <= max_points:
        return curve
    half = max_points // 2
    evenly = np.linspace(0, num - 1, half)
    from_end = num - np.geomspace(1, num, max_points - half)
    ranks = np.unique(np.concatenate((evenly, from_end)).astype(np.int64))
    return Curve(curve.name, curve.x[ranks], curve.y[ranks], curve.before)


def thin_timeline(curve: Curve, max_points: int) -> Curve:
    """The largest value of each of so many equal spans of time: peaks stay, and never look lower than they were."""
    num = len(curve.x)
    if num <= max_points:
        return curve
    spans = np.linspace(curve.x[0], curve.x[-1], max_points)
    starts = np.unique(np.searchsorted(curve.x, spans))
    return Curve(curve.name, curve.x[starts], np.maximum.reduceat(curve.y, starts), curve.before)
