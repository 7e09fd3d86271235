"""How times, shares and limits are written."""

from __future__ import annotations

import pytest

from loadtest.goodput import Limits
from loadtest.report import wording


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (0.0, "0 s"),
        (0.00000005, "0.0500 µs"),
        (0.00085, "850 µs"),
        (0.0123, "12.3 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1.00 s"),
        (1.5, "1.50 s"),
        (1234.5, "1,234 s"),
        (-0.002, "-2.00 ms"),
        (None, "–"),
    ],
)
def test_times_have_three_digits_and_a_unit(value_s: float | None, text: str) -> None:
    assert wording.time(value_s) == text


@pytest.mark.parametrize(
    ("value_s", "text"), [(0.0, "0 s"), (0.05, "50 ms"), (0.0125, "12.5 ms"), (1.5, "1.5 s"), (5e-05, "50 µs")]
)
def test_limits_are_written_as_given(value_s: float, text: str) -> None:
    assert wording.short_time(value_s) == text


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.0 %"), (0.9999, ">99.9 %"), (0.921, "92.1 %"), (1e-4, "<0.1 %"), (0.0, "0.0 %")]
)
def test_shares_are_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert wording.share(share) == text


@pytest.mark.parametrize(("share", "text"), [(1.0, "100 %"), (0.25, "25 %"), (0.00001, "0.001 %"), (0.0, "0 %")])
def test_shares_on_an_axis_have_no_zeros_at_the_end(share: float, text: str) -> None:
    assert wording.short_share(share) == text


def test_numbers_keep_three_digits() -> None:
    assert [wording.number(value) for value in (0.914, 3.675, 42.35, 1234.4, 0.0)] == [
        "0.914",
        "3.67",
        "42.4",
        "1,234",
        "0",
    ]


def test_limits_in_one_line() -> None:
    assert wording.limits(Limits(0.5, (0.05, 0.1))) == "TTFT ≤ 500 ms, gaps ≤ 50 ms / 100 ms"
    assert wording.limits(Limits(None, ())) == "no limit on TTFT, no limit on gaps"
    assert wording.limit(None, None) == "no limits"
