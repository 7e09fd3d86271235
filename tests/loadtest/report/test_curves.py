"""Shares by hand, and thinning that keeps ends, tails and peaks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import PoolSample
from loadtest.report.curves import (
    Curve,
    in_flight,
    pools,
    share_beyond,
    share_within,
    thin_distribution,
    thin_timeline,
)
from tests.loadtest.sample_runs import request

VALUES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300).map(np.array)


def test_shares_within_and_beyond_by_hand() -> None:
    values = np.array([3.0, 1.0, 2.0, 2.0])
    within, beyond = share_within("", values), share_beyond("", values)
    assert [within.at(x) for x in (0.5, 1.0, 1.5, 2.0, 3.0, 9.0)] == [0.0, 0.25, 0.25, 0.75, 1.0, 1.0]
    assert [beyond.at(x) for x in (0.5, 1.0, 1.5, 2.0)] == [1.0, 0.75, 0.75, 0.25]
    assert share_within("", values, num_all=8).at(3.0) == 0.5


@given(VALUES, st.floats(1e-6, 1e3))
def test_within_and_beyond_make_up_the_whole_below_the_maximum(values: np.ndarray, x: float) -> None:
    if x < values.max():
        total = share_within("", values).at(x) + share_beyond("", values).at(x)
        assert abs(total - 1) < 1e-9


def test_nothing_makes_an_empty_curve() -> None:
    nothing = np.array([])
    assert share_within("", nothing).x.size == share_beyond("", nothing).x.size == 0
    assert share_beyond("", np.array([1.0, 1.0])).x.size == 0


@given(st.integers(1, 20_000), st.integers(10, 400))
def test_a_thinned_distribution_keeps_both_ends_and_the_tail(num: int, max_points: int) -> None:
    curve = share_within("", np.arange(num, dtype=np.float64))
    thin = thin_distribution(curve, max_points)
    assert len(thin.x) <= max(max_points, 1)
    assert (thin.x[0], thin.x[-1]) == (curve.x[0], curve.x[-1])
    assert (np.diff(thin.x) > 0).all()
    assert all(thin.y == curve.y[thin.x.astype(np.int64)])


def test_the_tail_of_a_million_values_keeps_its_shape() -> None:
    values = np.random.default_rng(3).pareto(2.0, 1_000_000)
    curve = share_within("", values)
    thin = thin_distribution(curve, 400)
    for tail in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        exact = np.quantile(values, 1 - tail)
        drawn = thin.x[np.searchsorted(thin.y, 1 - tail)]
        assert abs(np.log(drawn / exact)) < 0.1


def test_in_flight_counts_sent_and_not_ended() -> None:
    curve = in_flight("", [request(0.0, (5.0,)), request(1.0, (2.0,)), request(1.5, sent_s=3.0, ended_s=4.0)])
    assert [curve.at(x) for x in (-1.0, 0.0, 1.0, 2.5, 3.0, 4.5, 5.0)] == [0, 1, 2, 1, 2, 1, 0]


def test_pools_have_a_curve_for_each_queue_and_batch() -> None:
    curves = pools([PoolSample(0.0, 1, 2, 3, 4), PoolSample(1.0, 5, 6, 7, 8)])
    assert [(curve.at(0.5), curve.at(1.0)) for curve in curves] == [(1, 5), (2, 6), (3, 7), (4, 8)]


def test_a_thinned_timeline_keeps_its_peaks() -> None:
    counts = np.zeros(10_000)
    counts[[7, 5_003, 9_999]] = (3, 9, 5)
    thin = thin_timeline(Curve("", np.arange(10_000) / 100, counts), 50)
    assert len(thin.x) <= 50
    assert sorted(thin.y[thin.y > 0]) == [3, 5, 9]
