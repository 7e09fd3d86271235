"""The clock never returns early, and waits for nothing that is past."""

from __future__ import annotations

import asyncio

from loadtest.clock import MonotonicClock


async def test_sleeping_ends_at_the_moment_asked_for_and_not_before() -> None:
    clock = MonotonicClock()
    for _ in range(20):
        at_s = clock.now_s() + 0.003
        await clock.sleep_until(at_s)
        assert at_s <= clock.now_s() < at_s + 20.0


async def test_the_loop_goes_on_during_the_last_millisecond() -> None:
    clock = MonotonicClock()
    num_turns = 0

    async def count() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await clock.sleep_until(clock.now_s() + 0.001)
    counting.cancel()
    assert num_turns > 1


async def test_what_is_past_returns_at_once() -> None:
    clock = MonotonicClock()
    before_s = clock.now_s()
    await clock.sleep_until(before_s - 5.0)
    assert clock.now_s() - before_s < 20.0
