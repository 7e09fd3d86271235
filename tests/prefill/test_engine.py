"""The step loop: ahead of the ranks by one plan, told of every event, and over when the ranks are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from common.errors import InternalError, Unavailable
from common.worker.rank_messages import FrontStepMessage
from common.worker.step_plan import StepResult
from common.worker.step_watchdog import StepWatchdog
from services.prefill.engine import PrefillEngine, SendableBlocks
from services.prefill.metrics import PrefillMetrics
from tests.prefill.builders import make_request, make_scheduler
from tests.prefill.fakes import FIRST_TOKEN, FakeRanks, Wire


def make_engine(ranks: FakeRanks, now_ns: Callable[[], int] = time.monotonic_ns) -> PrefillEngine:
    watchdog = StepWatchdog(ranks, 60.0)
    return PrefillEngine(ranks, watchdog, make_scheduler(), PrefillMetrics(), lambda: None, now_ns)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[PrefillEngine, FakeRanks]]:
    ranks = FakeRanks(Wire(), [1])
    ranks.is_manual = True
    engine = make_engine(ranks)
    task = asyncio.create_task(engine.run())
    try:
        yield engine, ranks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def turn() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_two_plans_are_in_flight_and_no_more() -> None:
    async with running() as (engine, ranks):
        engine.submit(make_request(60))
        await turn()
        assert [plan.step_id for plan in ranks.plans] == [0, 1]
        ranks.answer_step()
        await turn()
        assert [plan.step_id for plan in ranks.plans] == [1, 2]


async def test_prompts_that_come_together_share_a_step() -> None:
    async with running() as (engine, ranks):
        for start in range(3):
            engine.submit(make_request(4, start=start))
        await turn()
        assert len(ranks.plans) == 1
        assert len(ranks.plans[0].segments) == 3


async def test_prompt_that_comes_while_a_step_runs_is_planned_at_once() -> None:
    async with running() as (engine, ranks):
        engine.submit(make_request(4))
        await turn()
        engine.submit(make_request(4, start=1))
        await turn()
        assert len(ranks.plans) == 2


async def test_job_learns_of_its_blocks_and_its_token() -> None:
    async with running() as (engine, ranks):
        job = engine.submit(make_request(22))
        waiting = asyncio.create_task(job.sendable_blocks(0))
        token = asyncio.create_task(job.first_token())
        assert not waiting.done()
        await turn()
        assert await waiting == SendableBlocks(4, ranks.plans[0].step_id)
        assert len(job.block_ids(1, 3)) == 3
        later = asyncio.create_task(job.sendable_blocks(4))
        await turn()
        assert not later.done(), "the next step is planned, but not under way"
        ranks.answer_step()
        assert await later == SendableBlocks(6, ranks.plans[0].step_id)
        assert await job.sendable_blocks(0) == SendableBlocks(4, -1)
        ranks.answer_step()
        await turn()
        assert await job.sendable_blocks(4) == SendableBlocks(6, -1)
        assert (await token).token_id == FIRST_TOKEN
        assert job.received_ns <= job.scheduled_ns < job.sampled_ns


async def test_prompt_is_scheduled_before_ranks_can_begin_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 1_000
    submit = FakeRanks.submit

    def slow_submit(self: FakeRanks, message: FrontStepMessage) -> None:
        nonlocal now_ns
        now_ns += 500  # the front is held up when the ranks have the plan already
        submit(self, message)

    monkeypatch.setattr(FakeRanks, "submit", slow_submit)
    ranks = FakeRanks(Wire(), [1])
    ranks.is_manual = True
    engine = make_engine(ranks, lambda: now_ns)
    job = engine.submit(make_request(4))
    await turn()
    assert ranks.plans
    assert (job.received_ns, job.scheduled_ns) == (1_000, 1_000)


async def test_lost_ranks_fail_jobs_now_and_later() -> None:
    async with running() as (engine, ranks):
        job = engine.submit(make_request(22))
        waits = [asyncio.create_task(job.sendable_blocks(4)), asyncio.create_task(job.watch())]
        await turn()
        ranks.lose("rank 0 died")
        for wait in waits:
            with pytest.raises(Unavailable, match="rank 0 died"):
                await wait
        with pytest.raises(Unavailable):
            await job.first_token()
        with pytest.raises(Unavailable):
            engine.submit(make_request(4))
        engine.release(job)
        assert engine.num_jobs == 0


async def test_broken_invariant_ends_the_loop() -> None:
    ranks = FakeRanks(Wire(), [1])
    engine = make_engine(ranks)
    ranks._results.put_nowait(StepResult(5, [], 1))
    with pytest.raises(InternalError):
        await engine.run()
    with pytest.raises(InternalError):
        engine.submit(make_request(4))
