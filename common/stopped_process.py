"""Notices that another process was stopped by a signal (SIGSTOP), which it cannot say itself and sockets do not show.

The kernel tells a stopped process from one that computes for long, so that none is given up for being busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

INTERVAL_S: Final = 1.0
MAX_STOPPED_LOOKS: Final = 4  # in a row, so for 3 to 4 s; somebody may stop a process for a moment to look into it


def is_stopped(pid: int) -> bool:
    """Whether the kernel says that a signal stopped the process; what a debugger holds is not meant."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone, which its parent hears otherwise
        return False
    return stat.rpartition(")")[2].split(maxsplit=1)[0] == "T"


async def wait_stopped(
    pid: int,
    look: Callable[[int], bool] = is_stopped,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Return when the process was found stopped four times in a row; until then, look every second.

    What counts is what this process saw: one that was stopped itself, with the other, finds it running again.
    """
    num_stopped = 0
    while num_stopped < MAX_STOPPED_LOOKS:
        await sleep(INTERVAL_S)
        num_stopped = num_stopped + 1 if look(pid) else 0
