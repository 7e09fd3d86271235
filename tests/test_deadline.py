"""Whose clock counts for one deadline."""

from __future__ import annotations

import pytest

from common.deadline import Deadline


def test_a_call_ends_by_our_clock_before_it_does_by_that_of_grpc() -> None:
    assert Deadline.of_call(10.0, 600.0, 100.0).at_s == pytest.approx(109.95)
    assert Deadline.of_call(0.1, 600.0, 100.0).at_s == pytest.approx(100.09)
    assert Deadline.of_call(0.0, 600.0, 100.0).timeout_s == 0.0
    assert Deadline.of_call(-1.0, 600.0, 100.0).timeout_s < 0.0


def test_a_limit_of_our_own_is_nobody_elses_clock() -> None:
    for remaining_s in (None, 900.0):
        assert Deadline.of_call(remaining_s, 600.0, 100.0) == Deadline(700.0, 600.0)


def test_what_ends_about_when_the_time_is_up_ends_for_that() -> None:
    deadline = Deadline(110.0, 10.0)
    assert deadline.explains_end(110.0)
    assert deadline.explains_end(109.9)  # the clock of somebody who waits for us was first
    assert not deadline.explains_end(109.7)
    assert Deadline(700.0, 600.0).explains_end(695.0)  # gRPC's wire says 600 s for what was left of them
