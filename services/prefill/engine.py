"""The step loop of one incarnation of the ranks: schedule, submit, await the result, tell the jobs.

Two plans are in flight at most, so that the ranks never wait for the front: a chunk does not depend on what the chunk
before it yields. Knows neither gRPC nor the hand-off; those await a `PrefillJob`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from baton.v1 import sampling_pb2

from common import errors
from common.telemetry.step_clock import StepClock
from common.worker.rank_group import RankGroup
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import SampledToken, StepPlan
from common.worker.step_watchdog import StepWatchdog
from services.prefill.metrics import PrefillMetrics
from services.prefill.request import (
    BlocksReady,
    BlocksUnderWay,
    Event,
    FirstTokenSampled,
    Prompt,
    PromptFailed,
    Scheduled,
)
from services.prefill.scheduler import Scheduler

MAX_PLANS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class ComputedChunk:
    """When a chunk of a prompt was computed, and which of its blocks are ready since."""

    start_ns: int
    end_ns: int
    first_block: int
    end_block: int


@dataclass(frozen=True, slots=True)
class SendableBlocks:
    """Blocks up to `end_block` are ready, or are being computed in the step `step_id` (-1: ready)."""

    end_block: int
    step_id: int


class PrefillJob:
    """One prompt in the engine, as its request awaits it. Times are of `time.monotonic_ns`; 0 until it happened."""

    def __init__(self, prompt: Prompt, received_ns: int) -> None:
        self.prompt = prompt
        self.received_ns = received_ns
        self.scheduled_ns = 0
        self.chunks: list[ComputedChunk] = []
        self.sampled_ns = 0
        self.num_cached_tokens = 0
        self.num_ready_blocks = 0
        self._under_way = SendableBlocks(0, -1)
        self._token: SampledToken | None = None
        self._error: errors.BatonError | None = None
        self._changed = asyncio.Event()

    @property
    def num_blocks(self) -> int:
        return self.prompt.num_blocks

    def block_ids(self, first_block: int, num_blocks: int) -> list[int]:
        """Blocks of the prompt, by their index within it. Those that are ready or under way only."""
        assert self.prompt.blocks is not None
        assert first_block + num_blocks <= max(self.num_ready_blocks, self._under_way.end_block)
        return self.prompt.blocks.block_ids[first_block : first_block + num_blocks]

    async def sendable_blocks(self, beyond: int) -> SendableBlocks:
        """Wait until blocks beyond the first `beyond` are ready or under way. Raises what the job failed with."""
        while True:
            if self.num_ready_blocks > beyond:
                return SendableBlocks(self.num_ready_blocks, -1)
            if self._under_way.end_block > beyond:
                return self._under_way
            await self._wait()

    async def ready(self, num_blocks: int) -> None:
        """Wait until so many leading blocks are ready. Raises what the job failed with."""
        while self.num_ready_blocks < num_blocks:
            await self._wait()

    async def first_token(self) -> SampledToken:
        """Wait for the token after the prompt. Raises what the job failed with."""
        while self._token is None:
            await self._wait()
        return self._token

    def finish_reason(self, token: SampledToken) -> sampling_pb2.FinishReason.ValueType:
        """Why the first token ends the output; unspecified if it does not."""
        request = self.prompt.request
        return request.finish_reason(token.token_id, request.num_output_tokens)

    async def watch(self) -> NoReturn:
        """Wait until the job fails, and raise what it failed with."""
        while True:
            await self._wait()

    def fail(self, error: errors.BatonError) -> None:
        """Whoever waits gets the error, now and later. The first one stays."""
        self._error = self._error or error
        self._wake()

    def take(self, event: Event, now_ns: int, compute_ns: int = 0) -> None:
        """Note what the scheduler reported, when `compute_ns` of computing were just over."""
        if isinstance(event, Scheduled):
            self.scheduled_ns = now_ns
            self.num_cached_tokens = event.num_cached_tokens
        elif isinstance(event, BlocksUnderWay):
            self._under_way = SendableBlocks(event.end_block, event.step_id)
        elif isinstance(event, BlocksReady):
            self.num_ready_blocks = event.end_block
            if event.first_block or not self.num_cached_tokens:  # else: it was in the cache
                self.chunks.append(ComputedChunk(now_ns - compute_ns, now_ns, event.first_block, event.end_block))
        elif isinstance(event, FirstTokenSampled):
            self.sampled_ns = now_ns
            self._token = event.token
        elif isinstance(event, PromptFailed):
            self.fail(errors.InternalError(f"the ranks failed the prompt: {event.reason}"))
        self._wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        await self._changed.wait()

    def _wake(self) -> None:
        """Everybody who waits now looks again."""
        self._changed.set()
        self._changed = asyncio.Event()


class PrefillEngine:
    """Drives one `RankGroup`. All methods run on one event loop; nothing but `run` awaits."""

    def __init__(
        self,
        ranks: RankGroup,
        watchdog: StepWatchdog,
        scheduler: Scheduler,
        counters: PrefillMetrics,
        on_change: Callable[[], None],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.scheduler = scheduler
        self._ranks = ranks
        self._watchdog = watchdog
        self._counters = counters
        self._on_change = on_change
        self._now_ns = now_ns
        self._jobs: dict[Prompt, PrefillJob] = {}
        self._error: errors.BatonError | None = None
        self._pump_is_due = False
        self._clock = StepClock(lambda idle_ns: counters.inc("idle_ns", idle_ns), now_ns=now_ns)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def submit(self, request: SequenceRequest) -> PrefillJob:
        """Queue a sequence. Raises `Unavailable` if the ranks are lost, and what `Scheduler.add` raises."""
        if self._error is not None:
            raise self._error
        prompt = self.scheduler.add(request)
        job = PrefillJob(prompt, self._now_ns())
        self._jobs[prompt] = job
        self._pump_soon()
        return job

    def release(self, job: PrefillJob) -> None:
        """The job is over, however it ended. Its blocks are free once no plan and no send uses them. Idempotent."""
        if self._jobs.pop(job.prompt, None) is not None:
            self.scheduler.release(job.prompt)
            self._pump_soon()

    def begin_read(self, job: PrefillJob) -> None:
        """See `Scheduler.begin_read`."""
        self.scheduler.begin_read(job.prompt)

    def end_read(self, job: PrefillJob) -> None:
        """See `Scheduler.end_read`."""
        self.scheduler.end_read(job.prompt)
        self._pump_soon()

    async def run(self) -> None:
        """Step until the ranks are lost: raises `Unavailable`. However it ends, every job has failed then."""
        try:
            while True:
                result = await self._ranks.next_result()
                self._watchdog.answered()
                self.scheduler.complete(result)
                self._counters.inc("steps")
                self._counters.inc("nonfinite_rows", result.num_not_finite)
                self._counters.step_duration.observe(result.compute_ns * 1e-9)
                self._clock.answered(self.scheduler.num_in_flight, self.scheduler.num_waiting_tokens > 0)
                self._pump(result.compute_ns)
        except errors.BatonError as error:
            self.fail_all(error)
            raise
        finally:
            self._watchdog.stop()
            self.fail_all(errors.WorkerDraining("the worker is stopping"))

    def fail_all(self, error: errors.BatonError) -> None:
        """Every job, and every later one, fails with this. The first error stays."""
        self._error = self._error or error
        for job in self._jobs.values():
            job.fail(self._error)

    def _pump_soon(self) -> None:
        """Pump once the callbacks that are due now have run, so that requests that come together are planned
        together."""
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self, compute_ns: int = 0) -> None:
        """Plan as far ahead as is allowed, and send it. `compute_ns`: of the step whose result just came."""
        self._pump_is_due = False
        if self._error is not None:
            return
        while self.scheduler.num_in_flight < MAX_PLANS_IN_FLIGHT and self.scheduler.plan():
            pass
        now_ns = self._now_ns()  # before the ranks can begin: a step lies within what is noted of its prompts
        for message in self.scheduler.take_messages():
            self._ranks.submit(message)
            if isinstance(message, StepPlan):
                self._watchdog.submitted()
                self._clock.submitted()
                self._counters.step_rows.observe(len(message.segments))
                self._counters.step_tokens.observe(sum(segment.num_tokens for segment in message.segments))
        if not self.scheduler.num_in_flight and not self.scheduler.num_waiting_tokens:
            self._clock.rest()
        for event in self.scheduler.take_events():
            job = self._jobs[event.prompt]
            job.take(event, now_ns, compute_ns)
            self._count(event, job)
        self._on_change()

    def _count(self, event: Event, job: PrefillJob) -> None:
        if isinstance(event, Scheduled):
            self._counters.inc("prompt_tokens", event.prompt.num_tokens)
            self._counters.inc("lookup_tokens", len(event.prompt.block_hashes) * self.scheduler.kv.block_size)
            self._counters.inc("cached_tokens", event.num_cached_tokens)
            self._counters.queue_wait.observe((job.scheduled_ns - job.received_ns) * 1e-9)
        elif isinstance(event, FirstTokenSampled):
            self._counters.inc("output_tokens")
