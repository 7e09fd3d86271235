"""What a run of steps says, from moments that are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step_times import Moment, StepTimes, percentile, summarize


class KnownMoment(Moment):
    """At so many milliseconds."""

    def __init__(self, at_ms: float) -> None:
        super().__init__(torch.device("cpu"))
        self._host_s = at_ms / 1e3


def times_of(*spans_ms: tuple[float, float], joins: list[int] | None = None, num_skipped: int = 1) -> StepTimes:
    times = StepTimes()
    moments = [(KnownMoment(begin), KnownMoment(end)) for begin, end in spans_ms]
    times.add_run(moments, [4] * len(moments), joins or [0] * len(moments), num_skipped)
    return times


def test_a_step_lasts_from_end_to_end_and_what_is_between_is_idle() -> None:
    summary = summarize(times_of((0, 10), (10, 20), (25, 30), (30, 45), joins=[9, 0, 1, 1]))
    assert (summary.num_steps, summary.rows) == (3, 4.0)
    assert summary.median_ms == pytest.approx(10)
    assert summary.max_ms == summary.p99_ms == pytest.approx(15)
    assert summary.p99_over_median == pytest.approx(1.5)
    assert summary.idle == pytest.approx(5 / 35)
    assert summary.max_gap_ms == pytest.approx(5)
    assert summary.joins_per_s == pytest.approx(2 / 0.035)  # those of the step that does not count do not count
    assert summary.joining_median_ms == pytest.approx(12.5)


def test_steps_that_do_not_count_leave_no_trace() -> None:
    slow_at_first = times_of((0, 500), (800, 900), (900, 910), (910, 920), num_skipped=2)
    assert slow_at_first.periods_ms == pytest.approx([10, 10])
    assert slow_at_first.gaps_ms == pytest.approx([0, 0])
    assert summarize(slow_at_first).joining_median_ms is None


def test_one_step_says_nothing() -> None:
    with pytest.raises(ValueError, match="1 steps say nothing"):
        summarize(times_of((0, 1), (1, 2)))


@pytest.mark.parametrize(("count", "value"), [(1, 1), (99, 99), (100, 99), (198, 197), (1000, 990)])
def test_the_p99_of_numbers_from_one_on(count: int, value: int) -> None:
    assert percentile(range(count, 0, -1), 0.99) == value
