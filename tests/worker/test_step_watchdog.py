"""Ranks that hang are noticed; ranks that are slow, or have nothing to do, are left alone."""

from __future__ import annotations

import asyncio
import time

import pytest

from common.worker import step_watchdog
from common.worker.rank_group import RankGroup
from common.worker.step_watchdog import StepWatchdog

SHORT_S = 0.02
LONG_S = 60.0


async def test_a_plan_without_an_answer_loses_the_group() -> None:
    group = RankGroup()
    StepWatchdog(group, SHORT_S).submitted()
    async with asyncio.timeout(5.0):
        assert "within 0.02 s" in await group.wait_lost()


async def test_the_plan_behind_an_answered_one_is_watched_too() -> None:
    group = RankGroup()
    watchdog = StepWatchdog(group, SHORT_S)
    watchdog.submitted()
    watchdog.submitted()
    watchdog.answered()
    async with asyncio.timeout(5.0):
        await group.wait_lost()


async def test_an_answer_that_is_read_late_because_the_front_stood_still_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop finds the timer due before it has read what came meanwhile."""
    monkeypatch.setattr(step_watchdog, "grace_s", lambda timeout_s: LONG_S)
    group = RankGroup()
    watchdog = StepWatchdog(group, SHORT_S)
    watchdog.submitted()
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(SHORT_S, due.set)
    time.sleep(2 * SHORT_S)  # noqa: ASYNC251 - that is the point
    await due.wait()  # timers fire in order
    watchdog.answered()
    assert group.lost_reason is None
    assert watchdog._timer is None


def test_the_grace_is_a_quarter_of_the_time_and_at_most_five_seconds() -> None:
    assert (step_watchdog.grace_s(2.0), step_watchdog.grace_s(60.0)) == (0.5, 5.0)


async def test_idle_ranks_are_not_watched() -> None:
    loop = asyncio.get_running_loop()
    group = RankGroup()
    watchdog = StepWatchdog(group, SHORT_S)
    watchdog.submitted()
    watchdog.answered()
    later = asyncio.Event()
    loop.call_later(2 * SHORT_S, later.set)  # timers fire in order: the watchdog's would have been first
    await later.wait()
    assert group.lost_reason is None


async def test_each_answer_starts_the_time_of_the_next_plan() -> None:
    group = RankGroup()
    watchdog = StepWatchdog(group, LONG_S)
    watchdog.submitted()
    first = watchdog._timer
    watchdog.submitted()
    assert watchdog._timer is first, "a plan that waits for another has no time of its own yet"
    watchdog.answered()
    assert first is not None
    assert first.cancelled()
    assert watchdog._timer is not None
    watchdog.stop()
    watchdog.stop()
    assert watchdog._timer is None
