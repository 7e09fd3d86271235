"""Prompts that decode computes itself: chunks beside decode steps, the cache, and what their routers are told."""

from __future__ import annotations

import pytest

from common.kvcache.kv_cache_manager import KVCacheManager
from common.worker.step_plan import AddRow, SampledToken, Segment, StepResult, unpack_tokens
from services.decode.plans import Plan
from services.decode.request import DecodeSequence, End, PromptComputed, SequenceEnded, StepsBegin, TokenSampled
from services.decode.scheduler import DecodeScheduler
from tests.decode.requests import EOS, make_request

BLOCK_SIZE = 4
ROUTER = "router"


def make_scheduler(chunk_tokens: int, num_blocks: int = 16, max_rows: int = 4) -> DecodeScheduler:
    return DecodeScheduler(lambda: KVCacheManager(num_blocks, BLOCK_SIZE), max_rows, 8, b"model", chunk_tokens)


def open_local(
    scheduler: DecodeScheduler, sequence_id: int, num_tokens: int, *, max_tokens: int = 8, shared: bool = False
) -> DecodeSequence:
    tokens = [0 if shared else sequence_id % 7, *(index % 7 for index in range(num_tokens - 1))]
    request = make_request(sequence_id, tokens, max_tokens=max_tokens)
    return scheduler.open(ROUTER, request, ticket_id=sequence_id, is_local=True, now_s=1.0)


def hand_off(scheduler: DecodeScheduler, sequence_id: int, num_tokens: int) -> DecodeSequence:
    request = make_request(sequence_id, [sequence_id % 7, *range(num_tokens - 1)], max_tokens=8)
    seq = scheduler.open(ROUTER, request, ticket_id=sequence_id)
    assert scheduler.reserve(seq)
    scheduler.verify(seq, range(seq.num_handoff_blocks))
    scheduler.join(seq, 1, 2.0)
    return seq


def segments_of(plan: Plan) -> list[Segment]:
    return plan.step.segments if plan.step is not None else []


def answer(scheduler: DecodeScheduler, plan: Plan, token_id: int = 1, now_s: float = 5.0) -> int:
    assert plan.step is not None
    sampled = [SampledToken(segment.row, token_id) for segment in plan.step.segments if segment.sample]
    return scheduler.complete(StepResult(plan.step.step_id, sampled, 0), now_s)


def test_a_prompt_is_computed_in_chunks_and_its_first_token_comes_with_the_last() -> None:
    scheduler = make_scheduler(chunk_tokens=6)
    seq = open_local(scheduler, 1, 14)
    plans = [scheduler.plan(2.0), scheduler.plan(2.5)]
    assert [type(message) for message in plans[0].messages] == [AddRow]
    answer(scheduler, plans[0])
    plans.append(scheduler.plan(3.0))
    chunks = [segments_of(plan)[0] for plan in plans]
    assert [(c.position, c.num_tokens, c.sample) for c in chunks] == [(0, 6, False), (6, 6, False), (12, 2, True)]
    assert [token for chunk in chunks for token in unpack_tokens(chunk.token_ids or b"")] == list(seq.request.token_ids)
    assert [len(chunk.new_block_ids) for chunk in chunks] == [4, 0, 0]
    assert chunks[-1].output_index == 0
    answer(scheduler, plans[1])
    assert not scheduler.has_events
    answer(scheduler, plans[2], token_id=3, now_s=9.0)
    assert scheduler.take_events() == [
        PromptComputed(seq.key, queue_ns=10**9, prefill_ns=7 * 10**9, num_cached_tokens=0),
        TokenSampled(seq.key, 0, 3, None, []),
    ]
    scheduler.check_integrity()


def test_the_step_after_the_last_chunk_is_planned_before_its_token_is_known() -> None:
    scheduler = make_scheduler(chunk_tokens=64)
    open_local(scheduler, 1, 5)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    (segment,) = segments_of(second)
    assert (segment.token_ids, segment.position, segment.output_index) == (None, 5, 1)
    answer(scheduler, first)
    answer(scheduler, second)
    assert [e.position for e in scheduler.take_events() if isinstance(e, TokenSampled)] == [0, 1]


def test_chunks_go_beside_decode_steps_and_never_take_their_place() -> None:
    scheduler = make_scheduler(chunk_tokens=4)
    decoding = hand_off(scheduler, 1, 6)
    answer(scheduler, scheduler.plan(0.0))
    computing = open_local(scheduler, 2, 9)
    rows = []
    for _ in range(3):
        plan = scheduler.plan(0.0)
        rows.append({segment.row: segment.num_tokens for segment in segments_of(plan)})
        answer(scheduler, plan)
    assert rows == [{decoding.row: 1, computing.row: size} for size in (4, 4, 1)]


def test_what_is_left_of_a_steps_chunk_goes_to_the_next_prompt() -> None:
    scheduler = make_scheduler(chunk_tokens=8)
    first, second = open_local(scheduler, 1, 6), open_local(scheduler, 2, 6)
    sizes = [{segment.row: segment.num_tokens for segment in segments_of(scheduler.plan(0.0))} for _ in range(2)]
    assert sizes == [{first.row: 6, second.row: 2}, {first.row: 1, second.row: 4}]


def test_cached_blocks_are_not_computed_again() -> None:
    scheduler = make_scheduler(chunk_tokens=64)
    open_local(scheduler, 1, 9, max_tokens=1, shared=True)
    answer(scheduler, scheduler.plan(0.0))
    again = open_local(scheduler, 2, 9, max_tokens=1, shared=True)
    (segment,) = segments_of(plan := scheduler.plan(2.0))
    assert (segment.position, segment.num_tokens) == (8, 1)
    scheduler.take_events()
    answer(scheduler, plan)
    assert PromptComputed(again.key, 10**9, 3 * 10**9, num_cached_tokens=8) in scheduler.take_events()


@pytest.mark.parametrize("end", ["close", "session", "expire"])
def test_a_prompt_that_ends_half_way_keeps_only_what_is_in_place(end: str) -> None:
    scheduler = make_scheduler(chunk_tokens=6)
    seq = open_local(scheduler, 1, 14)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    answer(scheduler, first)
    if end == "close":
        scheduler.close(seq.key)
    elif end == "session":
        scheduler.close_session(ROUTER)
    else:
        scheduler.expire(1e10)
    assert scheduler.kv_stats().num_held == 4  # a plan in flight may write to them
    assert answer(scheduler, second) == 0
    stats = scheduler.kv_stats()
    assert (stats.num_held, stats.num_cached) == (0, 1)
    scheduler.check_integrity()


def test_a_chunk_that_fails_ends_its_sequence_alone() -> None:
    scheduler = make_scheduler(chunk_tokens=4)
    failing, other = open_local(scheduler, 1, 6), hand_off(scheduler, 2, 6)
    plan = scheduler.plan(0.0)
    assert plan.step is not None
    sampled = [SampledToken(other.row, 3), SampledToken(failing.row, -1, error="broken")]
    scheduler.complete(StepResult(plan.step.step_id, sampled, 0), 0.0)
    ends = {e.key[1]: (e.end, e.error) for e in scheduler.take_events() if isinstance(e, SequenceEnded)}
    assert ends == {1: (End.FAILED, "broken")}


def test_a_first_token_that_ends_the_output_discards_the_step_after_it() -> None:
    scheduler = make_scheduler(chunk_tokens=64)
    open_local(scheduler, 1, 5)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert answer(scheduler, first, token_id=EOS) == 0
    assert answer(scheduler, second) == 1
    ends = [e.end for e in scheduler.take_events() if isinstance(e, SequenceEnded)]
    assert ends == [End.FINISHED]


def test_a_prompt_waits_for_blocks_and_takes_them_when_they_come_free() -> None:
    scheduler = make_scheduler(chunk_tokens=64, num_blocks=4)
    holder = hand_off(scheduler, 1, 8)
    open_local(scheduler, 2, 9)
    assert scheduler.num_waiting_for_blocks == 1
    assert [segment.row for segment in segments_of(scheduler.plan(0.0))] == [holder.row]
    scheduler.close(holder.key)
    assert scheduler.num_waiting_for_blocks == 1  # the plan in flight may still write
    scheduler.complete(StepResult(0, [SampledToken(0, 1)], 0), 0.0)
    assert scheduler.num_waiting_for_blocks == 0


def test_routers_hear_of_a_first_step_when_it_is_the_next_to_run() -> None:
    scheduler = make_scheduler(chunk_tokens=64)
    first = hand_off(scheduler, 1, 5)
    begins = [scheduler.plan(0.0)]
    assert [e.key for e in scheduler.take_events() if isinstance(e, StepsBegin)] == [first.key]
    second = hand_off(scheduler, 2, 5)
    begins.append(scheduler.plan(0.0))
    # The step before it is still under way.
    assert not any(isinstance(e, StepsBegin) for e in scheduler.take_events())
    answer(scheduler, begins[0])
    assert [e.key for e in scheduler.take_events() if isinstance(e, StepsBegin)] == [second.key]
    answer(scheduler, begins[1])
    assert not any(isinstance(e, StepsBegin) for e in scheduler.take_events())


def test_a_local_sequence_has_no_ticket() -> None:
    scheduler = make_scheduler(chunk_tokens=64)
    open_local(scheduler, 1, 5)
    hand_off(scheduler, 2, 5)
    assert scheduler.find_ticket(1) is None
    assert scheduler.find_ticket(2) is not None
