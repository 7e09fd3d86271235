"""A benchmark that misses a limit says which figure and which limit."""

from __future__ import annotations

import math

import pytest

from benchmarks.limits import Limit, exit_status, missed

LIMITS = (Limit("messages_per_s", ">=", 10_000), Limit("added_ms", "<=", 1.5), Limit("memory_mib", "<", 250))
KEPT = {"messages_per_s": 10_000.0, "added_ms": 1.5, "memory_mib": 249.9, "other": 1e9}


def test_figures_on_the_right_side_of_their_limits_miss_nothing() -> None:
    assert missed(KEPT, LIMITS) == []


@pytest.mark.parametrize(
    ("figure", "value", "line"),
    [
        ("messages_per_s", 9_999.0, "MISSED: messages_per_s is 9,999.000; the limit is >= 10,000"),
        ("added_ms", 1.51, "MISSED: added_ms is 1.510; the limit is <= 1.5"),
        ("memory_mib", 250.0, "MISSED: memory_mib is 250.000; the limit is < 250"),
        ("added_ms", math.nan, "MISSED: added_ms is nan; the limit is <= 1.5"),
    ],
)
def test_a_missed_limit_is_named_with_its_figure(figure: str, value: float, line: str) -> None:
    assert missed(KEPT | {figure: value}, LIMITS) == [line]


def test_a_figure_that_was_not_measured_is_missed() -> None:
    assert missed({}, LIMITS[:1]) == ["MISSED: messages_per_s was not measured; the limit is >= 10,000"]


def test_the_exit_status_tells_and_standard_error_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(KEPT, LIMITS) == 0
    assert capsys.readouterr().err == ""
    assert exit_status({"messages_per_s": 1.0, "added_ms": 2.0, "memory_mib": 1.0}, LIMITS) == 1
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["messages_per_s", "added_ms"]
