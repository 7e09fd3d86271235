"""What the prefill tests build over and over: requests, schedulers, and results as ranks would answer."""

from __future__ import annotations

from array import array

from common.kvcache.kv_cache_manager import KVCacheManager
from common.sampling.params import SamplingParams
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import SampledToken, StepPlan, StepResult
from services.prefill.admission import SchedulerLimits
from services.prefill.scheduler import Scheduler

BLOCK_SIZE = 4


def make_request(
    num_tokens: int, *, start: int = 0, num_output_tokens: int = 0, max_tokens: int = 100, tenant: str = ""
) -> SequenceRequest:
    """`start` makes prompts differ from the first token on."""
    return SequenceRequest(
        request_id=f"r-{start}",
        sequence_id=start,
        token_ids=array("I", range(start * 1000, start * 1000 + num_tokens)),
        num_prompt_tokens=num_tokens - num_output_tokens,
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
        tenant=tenant,
        deadline_s=1e9,
    )


def make_scheduler(limits: SchedulerLimits | None = None, num_blocks: int = 64) -> Scheduler:
    limits = limits or SchedulerLimits(max_rows=8, max_step_tokens=16, max_waiting=100)
    return Scheduler(KVCacheManager(num_blocks, BLOCK_SIZE), limits, b"model")


def answer(plan: StepPlan, token_id: int = 42) -> StepResult:
    """What the ranks make of a plan."""
    sampled = [SampledToken(segment.row, token_id) for segment in plan.segments if segment.sample]
    return StepResult(plan.step_id, sampled, 1000)
