"""Notices ranks that hang while no step is due: their KV threads are asked for a sign of life, again and again.

The counterpart of `step_watchdog`. Knows nothing of hand-offs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from common.errors import Unavailable
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import GetTransportStats
from common.worker.step_watchdog import grace_s

_ROUNDS: Final = 4  # in the time that an answer may take


async def watch_kv_threads(
    group: RankGroup, timeout_s: float, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Declare the group lost when a rank does not answer on its KV channel within `timeout_s`, and when asked again not
    within `grace_s`; returns when it is lost.

    A slot that such a rank holds can be given back by nothing but its end.
    """
    while group.lost_reason is None:
        await sleep(timeout_s / _ROUNDS)
        try:
            if not await _all_answer(group, timeout_s) and not await _all_answer(group, grace_s(timeout_s)):
                group.lose(f"the ranks hang: no answer on a KV channel within {timeout_s:g} s")
        except Unavailable:
            return


async def _all_answer(group: RankGroup, timeout_s: float) -> bool:
    """Whether every rank answers in time. Raises `Unavailable` if the group is lost."""
    asked = [group.begin(rank, GetTransportStats(group.next_op_id())) for rank in range(len(group.pids))]
    try:
        async with asyncio.timeout(timeout_s):
            for operation in asked:
                await operation.reply()
    except TimeoutError:
        return False
    finally:
        for operation in asked:
            operation.close()
    return True
