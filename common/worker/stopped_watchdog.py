"""Notices ranks that were stopped (SIGSTOP), idle or in a step, long before the time of a step is up.

A stopped process is told from one that computes for long by what the kernel says of it, so that none is given up for
being busy. The counterpart of `step_watchdog` and `kv_watchdog`, which notice ranks that hang otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from common.worker.rank_group import RankGroup

INTERVAL_S: Final = 1.0
MAX_STOPPED_LOOKS: Final = 3  # in a row; somebody who looks into a process may stop it for a moment


async def watch_for_stopped(
    group: RankGroup,
    is_stopped: Callable[[int], bool] | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Declare the group lost when one of its processes was found stopped three times in a row; returns when it is lost.

    What counts is what this process saw: one that was stopped itself, with its ranks, finds them running again.
    """
    look = is_stopped or _is_stopped
    num_stopped = [0] * len(group.pids)
    while group.lost_reason is None:
        await sleep(INTERVAL_S)
        for rank, pid in enumerate(group.pids):
            num_stopped[rank] = num_stopped[rank] + 1 if look(pid) else 0
            if num_stopped[rank] >= MAX_STOPPED_LOOKS:
                group.lose(f"rank {rank} (process {pid}) is stopped")


def _is_stopped(pid: int) -> bool:
    """Whether the kernel says that a signal stopped the process; what a debugger holds is not meant."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone, which its channels tell
        return False
    return stat.rpartition(")")[2].split(maxsplit=1)[0] == "T"
