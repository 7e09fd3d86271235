"""Keeps a worker's ranks alive: starts them, says when they are ready or lost, and starts them again.

    STARTING ── start() returned ──▶ READY ── a rank is lost ──▶ STARTING (after a delay that doubles)
        │ a checkpoint that cannot be served, at the first start, or too many failures in a row and no service before
        ▼
      `run` raises: the process has nothing to serve

What the ranks do is the owner's business: it passes how to start a group and what to do when one is ready or lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from common.errors import BatonError, Unavailable
from common.worker.kv_watchdog import watch_kv_threads
from common.worker.rank_group import RankGroup
from common.worker.stopped_watchdog import watch_for_stopped

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between failed starts: `first_s`, doubled each time up to `max_s`; after `max_failures` in a row the
    worker gives up."""

    first_s: float = 0.25
    max_s: float = 5.0
    max_failures: int = 8

    def delay_s(self, num_failures: int) -> float:
        """How long to wait after the n-th failure in a row, n from 1."""
        return min(self.max_s, self.first_s * 2.0 ** (num_failures - 1))


class RankSupervisor:
    """Runs one `RankGroup` after the other.

    `start_group` starts a group (see `RankGroup.start`). `on_ready` gets it once all ranks are ready; `on_lost`
    gets the reason as soon as one is lost, before the rest is stopped. Neither may block. `stop_grace_s`: how long
    ranks may take to end by themselves; `hang_timeout_s`: how long a sign of life may take (`kv_watchdog`).
    """

    def __init__(
        self,
        start_group: Callable[[], Awaitable[RankGroup]],
        on_ready: Callable[[RankGroup], None],
        on_lost: Callable[[str], None],
        backoff: Backoff = Backoff(),
        stop_grace_s: float = 1.0,
        hang_timeout_s: float = 60.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._start_group = start_group
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._backoff = backoff
        self._stop_grace_s = stop_grace_s
        self._hang_timeout_s = hang_timeout_s
        self._sleep = sleep
        self.num_restarts = 0  # groups that were lost

    async def run(self) -> None:
        """Keep a group running until cancelled; its processes are gone when this ends.

        Raises what the first start raised if a rank said why (`ModelError`, ...), and the last error after
        `max_failures` failures in a row: starts that failed, and groups that were lost soon after they stood, unless
        one has served or lasted before. Then it is not the worker that cannot serve, but something that ends its ranks
        (a stranger's bytes on a KV port, say), and it goes on starting them, slowly.
        """
        num_failures = 0
        num_lost_soon = 0  # groups in a row
        was_ready = False
        has_served = False
        while True:
            try:
                group = await self._start_group()
            except BatonError as error:
                num_failures += 1
                # Unavailable: it died or was slow, which may pass. What a rank says of a checkpoint will not.
                if num_failures >= self._backoff.max_failures or not (was_ready or isinstance(error, Unavailable)):
                    raise
                _log.warning("ranks did not start (%d in a row): %s", num_failures, error)
                await self._sleep(self._backoff.delay_s(num_failures))
                continue
            was_ready = True
            started_s = asyncio.get_running_loop().time()
            await self._attend(group)
            lasted = asyncio.get_running_loop().time() - started_s >= self._backoff.max_s
            has_served |= lasted or group.has_served
            num_failures = 0 if has_served else num_failures + 1
            num_lost_soon = 0 if lasted else num_lost_soon + 1
            if num_failures >= self._backoff.max_failures:
                raise Unavailable(f"ranks were lost {num_failures} times in a row")
            if num_lost_soon > 1:  # no hot loop of restarts
                await self._sleep(self._backoff.delay_s(num_lost_soon - 1))

    async def _attend(self, group: RankGroup) -> None:
        """Returns when the group is lost and its processes are gone."""
        try:
            self._on_ready(group)
            async with asyncio.TaskGroup() as tasks:
                watching = [
                    tasks.create_task(watch_kv_threads(group, self._hang_timeout_s)),
                    tasks.create_task(watch_for_stopped(group)),
                ]
                reason = await group.wait_lost()
                for watch in watching:
                    watch.cancel()
            _log.error("ranks are lost: %s", reason)
            self.num_restarts += 1
            self._on_lost(reason)
        finally:
            await group.stop(self._stop_grace_s)
