"""A loop that stands still ends its process; a process that was stopped goes on."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading

import pytest

from common.awake_clock import TICK_S, AwakeClock
from common.loop_watchdog import END_STATUS, WARN_AFTER_S, Standstill, Verdict, watch_loop

_STANDS_STILL = """
import asyncio, time
from common.loop_watchdog import watch_loop

def stand_still():
    while True:
        time.sleep(0.01)

async def main():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch_loop(0.5))
        await asyncio.sleep(0)
        stand_still()

asyncio.run(main())
"""


def test_a_loop_is_warned_of_once_and_then_ended() -> None:
    standstill = Standstill(limit_s=10.0)
    looks = [standstill.look(1, 0.25 * tick) for tick in range(42)]
    assert looks.count(Verdict.STANDS) == 1
    assert looks.index(Verdict.STANDS) == round(WARN_AFTER_S / 0.25)
    assert looks.index(Verdict.END) == 40


def test_a_beat_begins_anew() -> None:
    standstill = Standstill(limit_s=2.0)
    assert standstill.look(1, 0.0) is Verdict.RUNS
    assert standstill.look(1, 1.5) is Verdict.STANDS
    assert standstill.look(2, 1.9) is Verdict.RUNS
    assert standstill.look(2, 3.5) is Verdict.STANDS
    assert standstill.look(2, 3.9) is Verdict.END


def test_time_in_which_the_watch_itself_did_not_run_does_not_count() -> None:
    standstill, clock = Standstill(limit_s=10.0), AwakeClock(0.0)
    assert standstill.look(1, clock.tick(TICK_S)) is Verdict.RUNS
    assert standstill.look(1, clock.tick(3600.0)) is Verdict.RUNS  # stopped for an hour; no beat came first
    assert standstill.look(1, clock.tick(3600.0 + TICK_S)) is Verdict.RUNS


def test_the_process_ends_with_a_status_and_says_where_it_stood() -> None:
    command = [sys.executable, "-c", _STANDS_STILL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == END_STATUS
    assert "stood still for 0.5 s" in done.stderr
    assert "in stand_still" in done.stderr


async def test_a_loop_that_runs_is_left_alone_and_the_thread_ends_with_its_task() -> None:
    def fail() -> None:
        raise AssertionError

    watching = asyncio.create_task(watch_loop(0.5, end=fail))
    await asyncio.sleep(0)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "loop-watchdog"]
    watching.cancel()
    await asyncio.wait({watching})
    await asyncio.to_thread(thread.join, 20)
    assert not thread.is_alive()


async def test_a_log_that_blocks_does_not_keep_the_process_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.loop_watchdog._LAST_WORDS_S", 0.05)
    monkeypatch.setattr("common.loop_watchdog.TICK_S", 0.01)
    monkeypatch.setattr("common.awake_clock.TICK_S", 0.01)
    ended, unblocked = threading.Event(), threading.Event()
    monkeypatch.setattr(logging.getLogger("common.loop_watchdog"), "log", lambda *_: unblocked.wait(20))
    watching = asyncio.create_task(watch_loop(0.05, end=ended.set))
    await asyncio.sleep(0)
    assert ended.wait(20), "while this very loop stands here"
    unblocked.set()
    watching.cancel()
    await asyncio.wait({watching})


async def test_without_a_limit_nothing_is_watched() -> None:
    watching = asyncio.create_task(watch_loop(0.0))
    await asyncio.sleep(0)
    assert not [thread for thread in threading.enumerate() if thread.name == "loop-watchdog"]
    watching.cancel()
    await asyncio.wait({watching})
