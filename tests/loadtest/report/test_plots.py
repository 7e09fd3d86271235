"""Scales map both ways, ticks are round, few and apart, paths are as small as they can be."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.report.curves import Curve
from loadtest.report.plots import Scale, line_path, linear_scale, log_scale, step_path, ticks

X = Scale(0.0, 10.0, 0.0, 100.0)
Y = Scale(0.0, 1.0, 100.0, 0.0)  # upwards
POSITIVE = st.floats(1e-7, 1e6)


def test_a_scale_maps_both_ways_and_clips() -> None:
    assert [X.pixel(value) for value in (-5.0, 0.0, 2.5, 99.0)] == [0, 0, 25, 100]
    assert Y.pixel(0.25) == 75
    log = Scale(0.01, 1.0, 0.0, 100.0, is_log=True)
    assert [log.pixel(value) for value in (0.0, 0.01, 0.1, 1.0)] == [0, 0, 50, 100]
    assert log.value(50.0) == pytest.approx(0.1)
    assert X.value(25.0) == 2.5


def test_a_step_path_holds_each_value_until_the_next() -> None:
    curve = Curve("", np.array([2.0, 5.0]), np.array([0.5, 1.0]))
    assert step_path(curve, X, Y) == "M0 100H20V50H50V0"


def test_points_on_one_pixel_are_drawn_once() -> None:
    curve = Curve("", np.array([2.0, 2.0001, 5.0]), np.array([0.5, 0.5, 1.0]))
    assert step_path(curve, X, Y) == "M0 100H20V50H50V0"


def test_a_line_path_goes_through_its_points() -> None:
    assert line_path(np.array([0.0, 1.25]), np.array([1.0, 0.5]), X, Y) == "M0 0L12.5 50"


@pytest.mark.parametrize(
    ("high", "expected"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (8.16, [0, 2, 4, 6, 8, 10]), (15.0, [0, 2.5, 5, 7.5, 10, 12.5, 15])],
)
def test_linear_ticks_are_round_and_reach_the_end(high: float, expected: list[float]) -> None:
    scale = linear_scale(high, 0.0, 400.0)
    assert ticks(scale) == pytest.approx(expected)
    assert scale.high == pytest.approx(expected[-1])


def test_counts_have_whole_ticks() -> None:
    assert ticks(linear_scale(1.0, 0.0, 400.0), whole=True) == (0, 1)
    assert ticks(linear_scale(15.0, 0.0, 400.0), whole=True) == (0, 3, 6, 9, 12, 15)


def test_logarithmic_ticks_are_what_a_reader_would_type() -> None:
    assert ticks(log_scale(0.02, 0.5, 0.0, 400.0)) == (0.02, 0.05, 0.1, 0.2, 0.5)
    assert ticks(log_scale(1.3, 1.3, 0.0, 400.0)) == pytest.approx((1.2, 1.25, 1.3, 1.35, 1.4))
    assert ticks(log_scale(1e-6, 1e3, 0.0, 400.0)) == (1e-6, 1e-4, 1e-2, 1.0, 100.0)


@given(POSITIVE, POSITIVE)
def test_logarithmic_ticks_are_few_apart_and_on_the_scale(one: float, other: float) -> None:
    scale = log_scale(min(one, other), max(one, other), 54.0, 466.0)
    found = ticks(scale)
    assert 2 <= len(found) <= 7
    assert all(scale.holds(value) for value in found)
    assert (np.diff(scale.pixels(np.array(found))) >= 20).all()


@given(POSITIVE, st.booleans())
def test_linear_ticks_are_few_and_on_the_scale(high: float, whole: bool) -> None:
    scale = linear_scale(high, 54.0, 466.0)
    found = ticks(scale, whole)
    assert scale.high >= high * (1 - 1e-9)
    assert 1 <= len(found) <= 7
    assert all(0 <= value <= scale.high * (1 + 1e-9) for value in found)
    assert not whole or all(value == int(value) for value in found)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=50))
def test_paths_hold_nothing_but_commands_and_numbers(points: list[tuple[float, float]]) -> None:
    points.sort()
    curve = Curve("", np.array([x for x, _ in points]), np.array([y for _, y in points]))
    assert re.fullmatch(r"M0 100(H[\d.]+V[\d.]+)*", step_path(curve, X, Y))


def test_a_logarithmic_scale_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot span"):
        log_scale(0.0, 1.0, 0.0, 1.0)
