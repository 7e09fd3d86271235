"""Histograms: where an observation is counted, and that a reader's numbers agree with each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.telemetry.histogram import Histogram


def test_a_value_is_counted_up_to_its_bound_and_beyond_the_last_one_without() -> None:
    histogram = Histogram("wait_seconds", "Waits.", (0.1, 0.5, 1.0))
    for value in (0.05, 0.1, 0.10001, 1.0, 7.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("0.1", 2), ("0.5", 3), ("1.0", 4), ("+Inf", 5)]
    assert histogram.count == 5
    assert histogram.sum == pytest.approx(8.25001)


def test_observations_of_one_value_may_come_together() -> None:
    histogram = Histogram("rows", "Rows.", (1, 2))
    histogram.observe(2, n=3)
    assert histogram.cumulative() == [("1.0", 0), ("2.0", 3), ("+Inf", 3)]
    assert histogram.sum == 6


def test_bounds_must_rise() -> None:
    with pytest.raises(AssertionError, match="rows"):
        Histogram("rows", "Rows.", (1, 1, 2))


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0, 100), unique=True).map(sorted))
def test_each_bucket_holds_what_does_not_exceed_its_bound(values: list[float], bounds: list[float]) -> None:
    histogram = Histogram("x", "X.", bounds)
    for value in values:
        histogram.observe(value)
    expected = [float(sum(value <= bound for value in values)) for bound in bounds]
    assert [count for _, count in histogram.cumulative()] == [*expected, len(values)]
