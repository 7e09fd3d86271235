"""A process that is stopped is noticed after some looks in a row, and not because of a moment."""

from __future__ import annotations

import pytest

from common.stopped_process import INTERVAL_S, MAX_STOPPED_LOOKS, wait_stopped


async def seen_after_s(looks: str) -> float:
    """How long until a process is given up of which this is seen, a character for each look; `T` is stopped, as is `t`,
    after having done something."""
    remaining, slept = list(looks), []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    await wait_stopped(1, lambda pid: {"T": 7, "t": 8}.get(remaining.pop(0)), sleep)
    assert not remaining
    return sum(slept)


async def test_it_is_noticed_within_five_seconds_and_not_before_three_have_passed() -> None:
    assert await seen_after_s("T" * MAX_STOPPED_LOOKS) <= 5.0
    assert INTERVAL_S * (MAX_STOPPED_LOOKS - 1) >= 3.0


async def test_looks_count_in_a_row_only() -> None:
    assert await seen_after_s("TTTRTTTSTTTT") == 12 * INTERVAL_S


async def test_one_that_ran_between_two_looks_is_not_given_up() -> None:
    assert await seen_after_s("TTTttTTTT") == 9 * INTERVAL_S


async def test_one_that_runs_is_looked_at_again_and_again() -> None:
    with pytest.raises(IndexError):
        await seen_after_s("RSRSTTTR")
