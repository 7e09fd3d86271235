"""Notices ranks that were stopped (SIGSTOP), idle or in a step, long before the time of a step is up.

The counterpart of `step_watchdog` and `kv_watchdog`, which notice ranks that hang otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from common.stopped_process import INTERVAL_S, MAX_STOPPED_LOOKS, is_stopped
from common.worker.rank_group import RankGroup


async def watch_for_stopped(
    group: RankGroup,
    look: Callable[[int], bool] = is_stopped,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Declare the group lost when one of its processes was found stopped four times in a row; returns when it is lost.

    What counts is what this process saw: one that was stopped itself, with its ranks, finds them running again.
    """
    num_stopped = [0] * len(group.pids)
    while group.lost_reason is None:
        await sleep(INTERVAL_S)
        for rank, pid in enumerate(group.pids):
            num_stopped[rank] = num_stopped[rank] + 1 if look(pid) else 0
            if num_stopped[rank] >= MAX_STOPPED_LOOKS:
                group.lose(f"rank {rank} (process {pid}) is stopped")
