"""Gaps and idle time of steps, on a virtual clock."""

from __future__ import annotations

import pytest

from common.telemetry.histogram import Histogram
from common.telemetry.step_clock import StepClock


class Steps:
    """A step clock whose time a test moves."""

    def __init__(self) -> None:
        self.now_ns = 1_000
        self.idle_ns = 0
        self.gaps = Histogram("gap_seconds", "Gaps.", (1e-7, 1e-6))
        self.clock = StepClock(self._add_idle, self.gaps, lambda: self.now_ns)

    def _add_idle(self, idle_ns: int) -> None:
        self.idle_ns += idle_ns

    def submit(self, after_ns: int = 0) -> None:
        self.now_ns += after_ns
        self.clock.submitted()

    def answer(self, after_ns: int, num_in_flight: int, has_work: bool = True) -> None:
        self.now_ns += after_ns
        self.clock.answered(num_in_flight, has_work)


@pytest.fixture
def steps() -> Steps:
    return Steps()


def test_a_plan_ahead_leaves_no_idle_time(steps: Steps) -> None:
    steps.submit()
    steps.submit(10)
    for _ in range(3):
        steps.answer(500, num_in_flight=1)
        steps.submit(50)
    assert steps.idle_ns == 0
    assert steps.gaps.count == 2
    assert steps.gaps.sum == pytest.approx(2 * 550e-9)


def test_time_without_a_plan_is_idle_while_there_is_work(steps: Steps) -> None:
    steps.submit()
    steps.answer(500, num_in_flight=0)
    steps.submit(70)
    steps.submit(5)
    assert steps.idle_ns == 70


def test_time_without_work_is_neither_idle_nor_a_gap(steps: Steps) -> None:
    steps.submit()
    steps.answer(500, num_in_flight=0, has_work=False)
    steps.submit(10_000)
    steps.answer(500, num_in_flight=0)
    assert (steps.idle_ns, steps.gaps.count) == (0, 0)


def test_work_that_goes_away_ends_the_idle_time_uncounted(steps: Steps) -> None:
    steps.submit()
    steps.answer(500, num_in_flight=0)
    steps.now_ns += 30
    steps.clock.rest()
    steps.submit(10_000)
    steps.answer(500, num_in_flight=0)
    assert (steps.idle_ns, steps.gaps.count) == (0, 0)
