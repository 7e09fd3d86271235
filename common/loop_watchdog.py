"""Ends a process whose event loop stands still: whoever supervises it can start another, nobody can wake this one.

A thread looks at beats of the loop. What counts is the time that the thread itself has run (`AwakeClock`), so a process
that was stopped, or a machine that was, is not taken for one that hangs.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from common.awake_clock import TICK_S, AwakeClock

_log = logging.getLogger(__name__)

MAX_STANDSTILL_S: Final = 10.0  # by default
WARN_AFTER_S: Final = 1.0
END_STATUS: Final = 70  # EX_SOFTWARE
_LAST_WORDS_S: Final = 2.0  # for the last lines of the log, which the loop's thread may hold


class Verdict(enum.Enum):
    """On a loop, at one look."""

    RUNS = enum.auto()
    STANDS = enum.auto()  # said once a standstill
    END = enum.auto()


class Standstill:
    """Judges beats. Pure."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._num_beats = -1
        self._since_s = 0.0
        self._is_told = False

    def look(self, num_beats: int, awake_s: float) -> Verdict:
        """`awake_s` is the time by the clock of whoever looks."""
        if num_beats != self._num_beats:
            self._num_beats, self._since_s, self._is_told = num_beats, awake_s, False
        stood_s = awake_s - self._since_s
        if stood_s >= self._limit_s:
            return Verdict.END
        if stood_s >= WARN_AFTER_S and not self._is_told:
            self._is_told = True
            return Verdict.STANDS
        return Verdict.RUNS


def _end_process() -> NoReturn:
    os._exit(END_STATUS)


async def watch_loop(limit_s: float, end: Callable[[], object] = _end_process) -> None:
    """Watch over the running loop until cancelled. `end` is called on another thread, once it stood for `limit_s`,
    and its stack was logged; 0 is never."""
    if not limit_s:
        await asyncio.Event().wait()
    watching = _Watching(limit_s, end)
    watching.thread.start()
    try:
        while True:
            watching.num_beats += 1
            await asyncio.sleep(TICK_S)
    finally:
        watching.is_over.set()


class _Watching:
    """The thread, and what it looks at."""

    def __init__(self, limit_s: float, end: Callable[[], object]) -> None:
        self.num_beats = 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="loop-watchdog", daemon=True)
        self._limit_s = limit_s
        self._end = end
        self._loop_thread = threading.get_ident()

    def _run(self) -> None:
        standstill = Standstill(self._limit_s)
        clock = AwakeClock(time.monotonic())
        while not self.is_over.wait(TICK_S):
            verdict = standstill.look(self.num_beats, clock.tick(time.monotonic()))
            if verdict is Verdict.STANDS:
                self._say(logging.WARNING, f"the event loop has stood still for {WARN_AFTER_S:g} s")
            elif verdict is Verdict.END:
                self._say(logging.CRITICAL, f"the event loop has stood still for {self._limit_s:g} s: the process ends")
                self._end()
                return

    def _say(self, level: int, what: str) -> None:
        """With the loop's stack. The log may be what it stands at: this waits for its turn, but not long."""
        frame = sys._current_frames().get(self._loop_thread)
        stack = "".join(traceback.format_stack(frame)) if frame else "no stack"
        saying = threading.Thread(target=_log.log, args=(level, "%s, at\n%s", what, stack), daemon=True)
        saying.start()
        saying.join(_LAST_WORDS_S)
