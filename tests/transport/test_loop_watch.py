"""A watch looks until it is over, lets the loop run in between, and rests as its patience says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from common import short_sleep
from common.short_sleep import Look, LoopWatch, Patience, loop_watch

PATIENCE = Patience(
    eager_s=300e-6, bite_s=60e-6, breath_s=1e-6, share=0.125, longest_s=50e-6, late_s=25e-6, courtesy_s=300e-6
)


class Clock:
    """Time that passes when somebody sleeps, or when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.sleeps: list[float] = []
        self.overslept_s = 5e-6

    def perf_counter(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds + self.overslept_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made.perf_counter)
    monkeypatch.setattr(short_sleep, "pause", made.pause)
    return made


class Watched:
    """Something that takes `look_s` to look at and is over when `left` looks have found nothing."""

    def __init__(self, clock: Clock, left: int, look_s: float = 10e-6) -> None:
        self.clock, self.left, self.look_s = clock, left, look_s
        self.found = Look.STILL

    def look(self) -> Look:
        self.clock.now_s += self.look_s
        self.left -= 1
        return self.found if self.left else Look.OVER


async def turns_until(condition: Callable[[], bool]) -> None:
    """A turn of the loop at a time: the clock is the test's, so nothing can be waited for."""
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to be")


async def over(watched: Watched) -> None:
    await turns_until(lambda: watched.left == 0)


def test_patience_grows_with_the_time_in_which_nothing_moves() -> None:
    assert PATIENCE.rest_s(0.0, 59e-6, False, False) == 0.0
    assert PATIENCE.rest_s(0.0, 60e-6, False, False) == 1e-6
    assert PATIENCE.rest_s(299e-6, 10e-6, False, False) == 0.0
    assert PATIENCE.rest_s(320e-6, 0.0, False, False) == pytest.approx(40e-6)
    assert PATIENCE.rest_s(10.0, 0.0, False, False) == 50e-6


def test_what_has_moved_is_passed_on_before_a_breath_but_not_for_ever() -> None:
    assert PATIENCE.rest_s(0.0, 119e-6, True, False) == 0.0
    assert PATIENCE.rest_s(0.0, 120e-6, True, False) == 1e-6


def test_the_courteous_breathe_after_every_look() -> None:
    assert PATIENCE.rest_s(0.0, 1e-6, False, True) == 1e-6
    assert PATIENCE.rest_s(0.0, 1e-6, True, True) == 0.0, "but pass on first what has moved"


async def test_a_short_operation_is_seen_without_a_rest(clock: Clock) -> None:
    watch, watched = LoopWatch(), Watched(clock, left=5)
    watch.add(watched.look)
    await over(watched)
    assert clock.sleeps == []
    assert watch.counts.num_turns == 5
    assert watch.counts.looking_s == pytest.approx(50e-6)


async def test_an_eager_watch_breathes_and_an_old_one_sleeps(clock: Clock) -> None:
    watch, watched = LoopWatch(), Watched(clock, left=100)
    watch.patience = PATIENCE
    watch.add(watched.look)
    await over(watched)
    breaths = [one for one in clock.sleeps if one == PATIENCE.breath_s]
    assert len(breaths) == 4  # every 60 µs of the first 300
    assert max(clock.sleeps) == PATIENCE.longest_s
    assert clock.sleeps == sorted(clock.sleeps)


async def test_movement_makes_it_eager_again(clock: Clock) -> None:
    watch, watched = LoopWatch(), Watched(clock, left=1000)
    watch.patience = PATIENCE
    watch.add(watched.look)
    await turns_until(lambda: PATIENCE.longest_s in clock.sleeps)
    watched.found = Look.MOVED
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    watched.found = Look.STILL
    clock.sleeps.clear()
    for _ in range(10):
        await asyncio.sleep(0)
    assert set(clock.sleeps) <= {PATIENCE.breath_s}
    watched.left = 1
    await over(watched)


async def test_a_late_end_of_a_sleep_makes_it_courteous_for_a_while(clock: Clock) -> None:
    watch, watched = LoopWatch(), Watched(clock, left=10_000)
    watch.patience = Patience(eager_s=1.0, bite_s=60e-6, breath_s=1e-6, late_s=25e-6, courtesy_s=300e-6)
    watch.add(watched.look)
    await turns_until(lambda: len(clock.sleeps) >= 1)
    clock.overslept_s = 50e-6  # another thread had the interpreter
    await turns_until(lambda: len(clock.sleeps) >= 2)
    clock.overslept_s = 5e-6
    looks, sleeps = watch.counts.num_turns, len(clock.sleeps)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(clock.sleeps) - sleeps == watch.counts.num_turns - looks > 5
    for _ in range(100):
        await asyncio.sleep(0)
    looks, sleeps = watch.counts.num_turns, len(clock.sleeps)
    for _ in range(60):
        await asyncio.sleep(0)
    assert 0 < len(clock.sleeps) - sleeps <= 0.2 * (watch.counts.num_turns - looks)
    watched.left = 1
    await over(watched)


async def test_operations_one_right_after_the_other_do_not_put_off_the_breath(clock: Clock) -> None:
    watch = LoopWatch()
    watch.patience = PATIENCE
    for _ in range(20):
        watched = Watched(clock, left=4)
        watch.add(watched.look)
        await over(watched)
    assert len(clock.sleeps) >= 8  # 800 µs of looking


async def test_everything_is_watched_in_turn_and_rests_once(clock: Clock) -> None:
    watch, one, other = LoopWatch(), Watched(clock, left=50), Watched(clock, left=80)
    watch.add(one.look)
    watch.add(other.look)
    watch.add(one.look)
    await over(one)
    assert other.left == 30
    await over(other)
    assert watch.counts.num_turns == 80
    assert watch.counts.num_rests == len(clock.sleeps) < 80


async def test_what_is_added_by_a_look_is_looked_at(clock: Clock) -> None:
    watch, later = LoopWatch(), Watched(clock, left=3)

    def first() -> Look:
        watch.add(later.look)
        return Look.OVER

    watch.add(first)
    await over(later)
    assert watch.counts.num_turns == 4


async def test_a_look_that_fails_is_told_and_the_others_go_on(clock: Clock) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    watch, watched = LoopWatch(), Watched(clock, left=3)

    def fail() -> Look:
        raise RuntimeError("no")

    watch.add(fail)
    watch.add(watched.look)
    await over(watched)
    assert [str(error) for error in told] == ["no"]


async def test_a_loop_has_one_watch() -> None:
    assert loop_watch() is loop_watch()
