"""The step loop of a decode worker: schedule → submit → results → tokens, one plan ahead of the ranks.

Nothing polls: whoever changes the scheduler calls `settle`, which tells routers and hand-offs what happened and wakes
the loop. Knows neither gRPC nor transports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from common.errors import Unavailable
from common.telemetry.step_clock import StepClock
from common.worker.rank_group import RankGroup
from common.worker.step_plan import StepPlan
from common.worker.step_watchdog import StepWatchdog
from services.decode.metrics import END_COUNTERS, DecodeMetrics
from services.decode.request import BlocksReserved, End, SequenceEnded, TokenSampled
from services.decode.scheduler import DecodeScheduler
from services.decode.sequence_records import SequenceRecords
from services.decode.sessions import Sessions

_log = logging.getLogger(__name__)


class DecodeEngine:
    """Runs the scheduler's plans on whatever rank group stands.

    A group that does not answer a step within `step_timeout_s` counts as lost. `on_ticket` hears of blocks that were
    reserved and of sequences that are gone; `on_change` of any change at all.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        sessions: Sessions,
        counters: DecodeMetrics,
        step_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.on_ticket: Callable[[BlocksReserved | SequenceEnded], None] = _ignore
        self.on_change: Callable[[], None] = _do_nothing
        self.clock = clock
        self.records = SequenceRecords(counters)
        self._sessions = sessions
        self._counters = counters
        self._steps_clock = StepClock(lambda idle_ns: counters.inc("idle_ns", idle_ns), counters.step_gap)
        self._step_timeout_s = step_timeout_s
        self._group: RankGroup | None = None
        self._group_changed = asyncio.Event()
        self._work = asyncio.Event()
        self._deadlines_changed = asyncio.Event()
        self._idle = asyncio.Event()

    def on_ready(self, group: RankGroup) -> None:
        """Compute on this group from now on."""
        self._group = group
        self._group_changed.set()
        self.on_change()

    def on_lost(self) -> None:
        """The ranks are gone: every sequence ends, here and now."""
        self._group = None
        self.scheduler.lose_all()
        self._group_changed.set()
        self.settle()

    def settle(self) -> None:
        """Pass on what the scheduler reports, and let the loop look for work. Call after every change to it."""
        num_tokens = 0
        for event in self.scheduler.take_events():
            if isinstance(event, TokenSampled):
                num_tokens += 1
                self._sessions.publish(event)
            elif isinstance(event, SequenceEnded):
                self._counters.inc(END_COUNTERS[event.end])
                if event.end is End.FAILED:
                    _log.warning("sequence %d failed: %s", event.key[1], event.error)
                self.records.ended(event)
                self._sessions.publish(event)
                self.on_ticket(event)
            elif isinstance(event, BlocksReserved):
                self.on_ticket(event)
            else:
                self.records.began(event)
                self._sessions.publish(event)
        self._counters.inc("tokens", num_tokens)
        self._sessions.flush()
        self._work.set()
        self._deadlines_changed.set()
        if self.scheduler.num_running == 0:
            self._steps_clock.rest()
        if self.scheduler.num_open == 0:
            self._idle.set()
        else:
            self._idle.clear()
        self.on_change()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no sequence is open; False if some are when the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.scheduler.num_open:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Step and expire until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._expire())
            tasks.create_task(self._serve_groups())

    async def _serve_groups(self) -> None:
        while True:
            await self._group_changed.wait()
            self._group_changed.clear()
            group = self._group
            if group is None:
                continue
            watchdog = StepWatchdog(group, self._step_timeout_s)
            try:
                async with asyncio.TaskGroup() as tasks:
                    submitting = tasks.create_task(self._submit_plans(group, watchdog))
                    # Caught here and not around the group, which would swallow a cancellation that comes with it.
                    with contextlib.suppress(Unavailable):  # the supervisor calls on_lost, if it has not
                        await self._take_results(group, watchdog)
                    submitting.cancel()
            finally:
                watchdog.stop()

    async def _submit_plans(self, group: RankGroup, watchdog: StepWatchdog) -> None:
        while self._group is group:
            plan = self.scheduler.plan(self.clock())
            for message in plan.messages:
                group.submit(message)
            if plan.step is not None:
                group.submit(plan.step)
                watchdog.submitted()
                self._steps_clock.submitted()
                self._counters.inc("steps")
                self._counters.step_rows.observe(len(plan.step.segments))
                self._counters.step_tokens.observe(_num_tokens(plan.step))
                self._work.set()  # there may be room for one more
            self.settle_quietly()
            await self._work.wait()
            self._work.clear()

    def settle_quietly(self) -> None:
        """`settle`, if planning preempted somebody or gave blocks away."""
        if self.scheduler.has_events:
            self.settle()

    async def _take_results(self, group: RankGroup, watchdog: StepWatchdog) -> None:
        while self._group is group:
            result = await group.next_result()
            watchdog.answered()
            if self._group is not group:
                return
            self._counters.inc("tokens_discarded", self.scheduler.complete(result, self.clock()))
            self._counters.inc("nonfinite_rows", result.num_not_finite)
            self._counters.step_duration.observe(result.compute_ns * 1e-9)
            self._steps_clock.answered(self.scheduler.num_plans_in_flight, self.scheduler.num_running > 0)
            self.settle()

    async def _expire(self) -> None:
        while True:
            deadline_s = self.scheduler.next_deadline_s
            wait_s = None if deadline_s is None else max(0.0, deadline_s - self.clock())
            try:
                async with asyncio.timeout(wait_s):
                    await self._deadlines_changed.wait()
                    self._deadlines_changed.clear()
            except TimeoutError:
                self.scheduler.expire(self.clock())
                self.settle()


def _num_tokens(step: StepPlan) -> int:
    """Input tokens: one of each decoding row, and those of the chunks, which come last."""
    num_tokens = len(step.segments)
    for segment in reversed(step.segments):
        if segment.token_ids is None:
            break
        num_tokens += segment.num_tokens - 1
    return num_tokens


def _ignore(event: BlocksReserved | SequenceEnded) -> None:
    pass


def _do_nothing() -> None:
    pass
