"""Notices that another process was stopped by a signal (SIGSTOP), which it cannot say itself and sockets do not show.

The kernel tells a stopped process from one that computes for long, so that none is given up for being busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

INTERVAL_S: Final = 1.0
MAX_STOPPED_LOOKS: Final = 4  # in a row, so for 3 to 4 s; somebody may stop a process for a moment to look into it
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12  # of /proc/PID/stat, behind the name


def stopped_at(pid: int) -> int | None:
    """The processor time that a process had used when a signal stopped it, in clock ticks; None if it is not stopped.

    What a debugger holds is not meant.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone, which its parent hears otherwise
        return None
    fields = stat.rpartition(")")[2].split()
    return int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS]) if fields[_STATE] == "T" else None


@dataclass(slots=True)
class Looks:
    """What was seen of one process, a look a second. `look` is `stopped_at`, or stands for it."""

    pid: int
    look: Callable[[int], int | None] = stopped_at
    _num_stopped: int = 0
    _ticks: int | None = None

    def is_stopped_for_good(self) -> bool:
        """Look once more: whether it was stopped at the last four looks, and has done nothing in between."""
        before, self._ticks = self._ticks, self.look(self.pid)
        if self._ticks is None:
            self._num_stopped = 0
        else:
            self._num_stopped = self._num_stopped + 1 if self._ticks == before else 1
        return self._num_stopped >= MAX_STOPPED_LOOKS


async def wait_stopped(
    pid: int,
    look: Callable[[int], int | None] = stopped_at,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Return when the process was found stopped four times in a row; until then, look every second.

    What counts is what this process saw: one that was stopped itself, with the other, finds it running again.
    """
    looks = Looks(pid, look)
    while True:
        await sleep(INTERVAL_S)
        if looks.is_stopped_for_good():
            return
