"""Arrival processes have the rate and the burstiness that they say, and the seed alone decides them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from common.errors import InvalidArgument
from loadtest.arrivals import Arrivals


def _gaps_s(arrivals: Arrivals, count: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.diff(list(itertools.islice(arrivals.due_times_s(seed), count + 1)))


@pytest.mark.parametrize("cv", [0.25, 1.0, 2.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    gaps_s = _gaps_s(Arrivals(8.0, cv), 40_000)
    assert gaps_s.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    gaps_s = _gaps_s(Arrivals(4.0), 40_000)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps_s, share) == pytest.approx(-np.log(1 - share) / 4, rel=0.05)


def test_constant_rate_does_not_drift() -> None:
    due_s = list(itertools.islice(Arrivals(3.0, cv=0.0).due_times_s(0), 3001))
    assert due_s[0] == 0.0
    assert due_s[3000] == 1000.0


def test_the_first_request_is_due_at_once_and_none_before_another() -> None:
    due_s = list(itertools.islice(Arrivals(100.0, cv=3.0).due_times_s(5), 3000))
    assert due_s[0] == 0.0
    assert due_s == sorted(due_s)


def test_the_seed_decides() -> None:
    assert list(_gaps_s(Arrivals(1.0), 50, seed=7)) == list(_gaps_s(Arrivals(1.0), 50, seed=7))
    assert list(_gaps_s(Arrivals(1.0), 50, seed=7)) != list(_gaps_s(Arrivals(1.0), 50, seed=8))


@pytest.mark.parametrize(
    ("rate", "cv"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, -0.5), (1.0, float("inf"))]
)
def test_what_is_no_rate_or_no_variation_is_refused(rate: float, cv: float) -> None:
    with pytest.raises(InvalidArgument):
        Arrivals(rate, cv)
