"""The first signal asks to finish what is under way, the same once more to hurry."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from common.parent_death import PARENT_GONE
from common.stop_signals import StopSignals


async def taken(number: signal.Signals, event: asyncio.Event) -> None:
    os.kill(os.getpid(), number)
    async with asyncio.timeout(20):
        await event.wait()


async def let_pass(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("first", "other"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
async def test_two_different_signals_are_one_wish_and_two_alike_are_haste(
    first: signal.Signals, other: signal.Signals
) -> None:
    signals = StopSignals()
    await taken(first, signals.stopping)
    await let_pass(other)  # as of a terminal and a parent
    assert not signals.hurrying.is_set()
    await taken(other, signals.hurrying)


async def test_the_death_of_a_parent_asks_however_often_it_is_told_and_never_hurries() -> None:
    signals = StopSignals()
    await taken(PARENT_GONE, signals.stopping)
    for _ in range(3):
        await let_pass(PARENT_GONE)
    await let_pass(signal.SIGTERM)  # the first of its kind
    assert not signals.hurrying.is_set()
    await taken(signal.SIGTERM, signals.hurrying)


async def test_haste_cancels_what_takes_its_time() -> None:
    signals = StopSignals()
    await taken(signal.SIGTERM, signals.stopping)
    ended = asyncio.Event()

    async def drain() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    draining = asyncio.create_task(signals.unless_hurried(drain()))
    await asyncio.sleep(0)
    await taken(signal.SIGTERM, signals.hurrying)
    assert await draining is False
    assert ended.is_set()


async def test_what_ends_by_itself_says_so_and_passes_its_error_on() -> None:
    signals = StopSignals()
    assert await signals.unless_hurried(asyncio.sleep(0)) is True

    async def fail() -> None:
        raise ValueError("drained badly")

    with pytest.raises(ValueError, match="drained badly"):
        await signals.unless_hurried(fail())
