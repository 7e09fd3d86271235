"""Notices ranks that were stopped (SIGSTOP), idle or in a step, long before the time of a step is up.

The counterpart of `step_watchdog` and `kv_watchdog`, which notice ranks that hang otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from common.stopped_process import INTERVAL_S, Looks, stopped_at
from common.worker.rank_group import RankGroup


async def watch_for_stopped(
    group: RankGroup,
    look: Callable[[int], int | None] = stopped_at,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Declare the group lost when one of its processes was found stopped four times in a row; returns when it is lost.

    What counts is what this process saw: one that was stopped itself, with its ranks, finds them running again.
    """
    ranks = [Looks(pid, look) for pid in group.pids]
    while group.lost_reason is None:
        await sleep(INTERVAL_S)
        for rank, looks in enumerate(ranks):
            if looks.is_stopped_for_good():
                group.lose(f"rank {rank} (process {looks.pid}) is stopped")
