"""A limit on a cost is kept, missed, or more than the measurement can tell; noise decides nothing."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.telemetry_verdict import Interval, Verdict, interval_of_median, judge, spread_of

QUIET = [0.001 * (n - 7) / 7 for n in range(15)]  # a control within 0.1 %
NOISY = [0.1 * (n - 7) / 7 for n in range(15)]


@pytest.mark.parametrize(("num", "ranks"), [(6, (1, 6)), (9, (2, 8)), (15, (4, 12)), (31, (10, 22))])
def test_the_interval_of_a_median_is_that_of_the_sign_test(num: int, ranks: tuple[int, int]) -> None:
    values = [float(n) for n in range(1, num + 1)]
    random.Random(3).shuffle(values)
    assert interval_of_median(values) == Interval(*ranks)


def test_of_too_few_rounds_nothing_is_known() -> None:
    assert interval_of_median([0.0] * 5) == Interval(-math.inf, math.inf)
    assert judge([0.0] * 5, [0.0] * 5) is Verdict.CANNOT_TELL


def test_the_interval_holds_the_median_about_as_often_as_is_said() -> None:
    source = random.Random(11)
    num_held = 0
    for _ in range(2000):
        interval = interval_of_median([source.expovariate(1.0) for _ in range(15)])
        num_held += interval.low <= math.log(2) <= interval.high
    assert 0.95 <= num_held / 2000 <= 0.98  # exactly: 0.965


@pytest.mark.parametrize(
    ("costs", "control", "verdict"),
    [
        ([0.002] * 15, QUIET, Verdict.KEPT),
        ([0.03] * 15, QUIET, Verdict.MISSED),
        ([0.0104] * 15, QUIET, Verdict.CANNOT_TELL),  # above the limit, by less than the control's spread
        ([0.002] * 15, NOISY, Verdict.CANNOT_TELL),
        ([0.03] * 15, NOISY, Verdict.CANNOT_TELL),
        ([0.5] * 15, NOISY, Verdict.MISSED),
        (NOISY, QUIET, Verdict.CANNOT_TELL),
    ],
)
def test_what_the_control_cannot_tell_apart_is_not_judged(
    costs: list[float], control: list[float], verdict: Verdict
) -> None:
    assert judge(costs, control) is verdict


def test_a_control_that_is_off_to_one_side_has_a_spread() -> None:
    assert spread_of([0.02] * 15) == pytest.approx(0.02)
    assert spread_of([-0.02] * 15) == pytest.approx(0.02)
