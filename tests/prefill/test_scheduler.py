"""What the prefill scheduler promises: budget, alignment, fairness, and nothing left behind."""

from __future__ import annotations

import pytest

from common.errors import InternalError, InvalidArgument, ResourceExhausted
from common.worker.step_plan import TOKEN_BYTES, AddRow, RemoveRow, SampledToken, StepPlan, StepResult
from services.prefill.admission import Policy, SchedulerLimits
from services.prefill.request import (
    BlocksReady,
    BlocksUnderWay,
    FirstTokenSampled,
    Prompt,
    PromptFailed,
    PromptState,
    Scheduled,
)
from services.prefill.scheduler import Scheduler
from tests.prefill.builders import BLOCK_SIZE, answer, make_request, make_scheduler

STEP_TOKENS = 16
RESERVED_TOKENS = 4


def next_plan(scheduler: Scheduler) -> StepPlan | None:
    """Plans one step; only its plan is of interest."""
    scheduler.plan()
    plans = [message for message in scheduler.take_messages() if isinstance(message, StepPlan)]
    return plans[0] if plans else None


def run_step(scheduler: Scheduler) -> StepPlan | None:
    plan = next_plan(scheduler)
    if plan is not None:
        scheduler.complete(answer(plan))
        scheduler.check_integrity()
    return plan


def steps_until_planned(scheduler: Scheduler, prompt: Prompt) -> int:
    num_steps = 0
    while prompt.num_scheduled < prompt.num_tokens:
        assert run_step(scheduler) is not None
        num_steps += 1
    return num_steps


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    scheduler.check_integrity()
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_waiting_tokens) == (0, 0, 0)
    assert scheduler.kv.stats().num_held == 0


def test_prompt_is_computed_in_aligned_chunks_and_reported() -> None:
    scheduler = make_scheduler()
    prompt = scheduler.add(make_request(22))
    assert scheduler.plan()
    add_row, plan = scheduler.take_messages()
    assert isinstance(add_row, AddRow)
    assert isinstance(plan, StepPlan)
    (segment,) = plan.segments
    assert (segment.position, segment.num_tokens, segment.sample) == (0, 16, False)
    assert len(segment.new_block_ids) == 6
    scheduler.complete(answer(plan))
    under_way = BlocksUnderWay(prompt, 0, 4, plan.step_id)
    assert scheduler.take_events() == [Scheduled(prompt, 0), under_way, BlocksReady(prompt, 0, 4)]
    last = next_plan(scheduler)
    assert last is not None
    assert scheduler.take_events() == [BlocksUnderWay(prompt, 4, 6, last.step_id)]
    (segment,) = last.segments
    assert (segment.position, segment.num_tokens, segment.sample) == (16, 6, True)
    assert segment.new_block_ids == []
    scheduler.complete(answer(last, token_id=7))
    ready, first = scheduler.take_events()
    assert ready == BlocksReady(prompt, 4, 6)
    assert isinstance(first, FirstTokenSampled)
    assert first.token.token_id == 7
    assert scheduler.take_messages() == [RemoveRow(add_row.row)]
    assert scheduler.kv.stats().num_held == 6
    scheduler.release(prompt)
    assert_nothing_is_held(scheduler)
    assert scheduler.kv.stats().num_cached == 5


def test_plans_run_ahead_of_their_results() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(40))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert first is not None
    assert second is not None
    assert [segment.position for plan in (first, second) for segment in plan.segments] == [0, 16]
    assert scheduler.num_in_flight == 2
    under_way = [event.step_id for event in scheduler.take_events() if isinstance(event, BlocksUnderWay)]
    assert under_way == [first.step_id], "the second waits for the first"
    with pytest.raises(InternalError, match="not the oldest"):
        scheduler.complete(answer(second))


def test_prompts_share_a_step() -> None:
    scheduler = make_scheduler()
    for start in range(4):
        scheduler.add(make_request(4, start=start))
    plan = next_plan(scheduler)
    assert plan is not None
    assert len({segment.row for segment in plan.segments}) == 4
    assert all(segment.sample for segment in plan.segments)


def test_cached_prefix_is_not_computed_again_and_ready_at_once() -> None:
    scheduler = make_scheduler()
    first = scheduler.add(make_request(16))
    run_step(scheduler)
    scheduler.release(first)
    scheduler.take_events()
    again = scheduler.add(make_request(16))
    plan = next_plan(scheduler)
    assert plan is not None
    (segment,) = plan.segments
    assert (segment.position, segment.num_tokens) == (12, 4)  # the last token is computed in any case
    under_way = BlocksUnderWay(again, 3, 4, plan.step_id)
    assert scheduler.take_events() == [Scheduled(again, 12), BlocksReady(again, 0, 3), under_way]


def test_tenants_do_not_share_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.release(scheduler.add(make_request(16, tenant="a")))
    first = scheduler.add(make_request(16, tenant="a"))
    run_step(scheduler)
    scheduler.release(first)
    other = scheduler.add(make_request(16, tenant="b"))
    run_step(scheduler)
    assert other.num_cached == 0


def test_two_prompts_that_start_alike_may_both_be_computed() -> None:
    scheduler = make_scheduler()
    twins = [scheduler.add(make_request(8)) for _ in range(2)]
    run_step(scheduler)
    assert [twin.state for twin in twins] == [PromptState.COMPUTED] * 2
    for twin in twins:
        scheduler.release(twin)
    assert_nothing_is_held(scheduler)


def test_migrated_sequence_replays_its_output() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(10, num_output_tokens=3))
    scheduler.plan()
    add_row, plan = scheduler.take_messages()
    assert isinstance(add_row, AddRow)
    assert isinstance(plan, StepPlan)
    assert (len(add_row.prompt_token_ids), len(add_row.output_token_ids)) == (7 * TOKEN_BYTES, 3 * TOKEN_BYTES)
    assert plan.segments[0].output_index == 3


def test_full_queue_refuses_with_a_hint() -> None:
    scheduler = make_scheduler(SchedulerLimits(max_rows=1, max_step_tokens=16, max_waiting=2))
    scheduler.add(make_request(16))
    scheduler.add(make_request(16))
    with pytest.raises(ResourceExhausted) as raised:
        scheduler.add(make_request(16))
    assert 0.1 <= raised.value.retry_after_s <= 10.0


def test_small_steps_say_nothing_of_the_time_that_a_queue_takes() -> None:
    scheduler = make_scheduler(SchedulerLimits(max_rows=2, max_step_tokens=16, max_waiting=2))
    times_s = []
    for num_tokens, compute_ns in ((3, 12_000), (16, 16_000), (3, 12_000), (3, 1_500)):
        scheduler.add(make_request(num_tokens))
        plan = next_plan(scheduler)
        assert plan is not None
        result = answer(plan)
        scheduler.complete(StepResult(result.step_id, result.sampled, compute_ns))
        times_s.append(scheduler.token_s)
    assert times_s[0] == pytest.approx(4e-6)  # better than nothing
    assert times_s[1] < times_s[0]
    assert times_s[2] == times_s[1]
    assert times_s[3] < times_s[2]


def test_a_step_in_which_the_machine_stood_still_says_nothing_of_the_time_that_a_queue_takes() -> None:
    scheduler = make_scheduler(SchedulerLimits(max_rows=2, max_step_tokens=16, max_waiting=2))
    for compute_ns in (16_000, 2_000_000_000, 16_000):
        scheduler.add(make_request(16))
        plan = next_plan(scheduler)
        assert plan is not None
        result = answer(plan)
        scheduler.complete(StepResult(result.step_id, result.sampled, compute_ns))
        assert scheduler.token_s == pytest.approx(1e-6)


def test_prompt_that_can_never_run_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        make_scheduler(num_blocks=4).add(make_request(17))


def test_short_prompt_does_not_wait_for_long_ones() -> None:
    scheduler = make_scheduler()
    longs = [scheduler.add(make_request(60, start=start)) for start in range(3)]
    run_step(scheduler)
    assert longs[0].num_scheduled > 0
    short = scheduler.add(make_request(STEP_TOKENS - RESERVED_TOKENS, start=9))
    run_step(scheduler)
    assert short.state is PromptState.COMPUTED


def test_long_prompt_is_done_within_its_bound_under_a_stream_of_short_ones() -> None:
    scheduler = make_scheduler(num_blocks=200)
    long = scheduler.add(make_request(100))
    num_steps = 0
    while long.num_scheduled < long.num_tokens:
        shorts = [scheduler.add(make_request(12, start=1 + num_steps * 2 + i)) for i in range(2)]
        assert run_step(scheduler) is not None
        for short in shorts:
            if short.state is PromptState.COMPUTED:
                scheduler.release(short)
        num_steps += 1
    assert 20 < num_steps <= -(-100 // RESERVED_TOKENS)


def test_oldest_gets_its_share_also_while_it_waits() -> None:
    scheduler = make_scheduler(num_blocks=200)
    for start in range(6):
        scheduler.add(make_request(16, start=start))
    first = scheduler.add(make_request(32, start=20))
    assert steps_until_planned(scheduler, first) <= 6 + 2


def test_first_come_computes_in_order_of_arrival() -> None:
    limits = SchedulerLimits(max_rows=8, max_step_tokens=16, max_waiting=100, policy="first-come")
    scheduler = make_scheduler(limits)
    long = scheduler.add(make_request(40))
    short = scheduler.add(make_request(4, start=1))
    run_step(scheduler)
    assert (long.num_scheduled, short.num_scheduled) == (16, 0)
    run_step(scheduler)
    run_step(scheduler)
    assert (long.num_scheduled, short.num_scheduled) == (40, 4)


def test_first_come_admits_nobody_past_a_prompt_without_blocks() -> None:
    limits = SchedulerLimits(max_rows=8, max_step_tokens=16, max_waiting=100, policy="first-come")
    scheduler = make_scheduler(limits, num_blocks=8)
    holder = scheduler.add(make_request(20))
    run_step(scheduler)
    run_step(scheduler)
    refused, later = scheduler.add(make_request(16, start=1)), scheduler.add(make_request(4, start=2))
    assert next_plan(scheduler) is None
    scheduler.release(holder)
    run_step(scheduler)
    run_step(scheduler)
    assert (refused.state, later.state) == (PromptState.COMPUTED, PromptState.COMPUTED)


def test_prompt_without_blocks_is_passed_only_so_often() -> None:
    limits = SchedulerLimits(max_rows=8, max_step_tokens=16, max_waiting=100, max_overtakes=3)
    scheduler = make_scheduler(limits, num_blocks=16)
    holder = scheduler.add(make_request(16))
    run_step(scheduler)
    large = scheduler.add(make_request(13 * BLOCK_SIZE, start=1))
    passed = 0
    for start in range(2, 10):
        short = scheduler.add(make_request(4, start=start))
        run_step(scheduler)
        passed += short.state is PromptState.COMPUTED
        scheduler.release(short)
    assert passed == 3
    assert large.state is PromptState.WAITING
    scheduler.release(holder)
    steps_until_planned(scheduler, large)
    after = scheduler.add(make_request(4, start=20))
    run_step(scheduler)
    assert after.state is PromptState.COMPUTED


def test_long_prompts_leave_blocks_and_rows_to_short_ones() -> None:
    limits = SchedulerLimits(max_rows=4, max_step_tokens=16, max_waiting=100)
    scheduler = make_scheduler(limits, num_blocks=40)
    longs = [scheduler.add(make_request(32, start=start)) for start in range(6)]
    for _ in range(12):
        run_step(scheduler)
    assert sum(long.blocks is not None for long in longs) == 2  # computed, and still being handed off
    shorts = [scheduler.add(make_request(4, start=start)) for start in (20, 21)]
    run_step(scheduler)
    assert [short.state for short in shorts] == [PromptState.COMPUTED] * 2


def test_short_long_prompts_do_not_starve_a_larger_one() -> None:
    limits = SchedulerLimits(max_rows=8, max_step_tokens=16, max_waiting=100)
    scheduler = make_scheduler(limits, num_blocks=40)
    others = [scheduler.add(make_request(20, start=0))]
    run_step(scheduler)
    large = scheduler.add(make_request(120, start=1))
    handed_off: list[Prompt] = []
    for start in range(2, 40):
        others.append(scheduler.add(make_request(20, start=start)))
        run_step(scheduler)
        for prompt in handed_off:  # one step later than computed: there is always a long prompt with blocks
            scheduler.release(prompt)
        handed_off = [prompt for prompt in others if prompt.state is PromptState.COMPUTED]
    assert large.state is not PromptState.WAITING


@pytest.mark.parametrize("policy", ["shortest-remaining", "first-come"])
def test_blocks_are_freed_only_when_no_plan_and_no_send_uses_them(policy: Policy) -> None:
    scheduler = make_scheduler(SchedulerLimits(max_rows=8, max_step_tokens=16, max_waiting=9, policy=policy))
    prompt = scheduler.add(make_request(40))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert first is not None
    assert second is not None
    scheduler.complete(answer(first))
    scheduler.begin_read(prompt)
    scheduler.release(prompt)
    assert scheduler.take_messages() == [RemoveRow(first.segments[0].row)]
    assert scheduler.take_events() == []
    scheduler.complete(answer(second))
    assert scheduler.kv.stats().num_held == 10
    scheduler.end_read(prompt)
    assert_nothing_is_held(scheduler)
    assert scheduler.kv.stats().num_cached == 8  # what was computed stays useful


def test_row_of_a_released_prompt_is_given_away_at_once() -> None:
    scheduler = make_scheduler(SchedulerLimits(max_rows=1, max_step_tokens=16, max_waiting=9))
    first = scheduler.add(make_request(32))
    ahead = next_plan(scheduler)
    scheduler.release(first)
    second = scheduler.add(make_request(8, start=1))
    plan = next_plan(scheduler)
    assert ahead is not None
    assert plan is not None
    scheduler.complete(answer(ahead))
    scheduler.complete(answer(plan))
    assert second.state is PromptState.COMPUTED
    scheduler.release(second)
    assert_nothing_is_held(scheduler)


def test_release_of_a_waiting_prompt_leaves_the_queue() -> None:
    scheduler = make_scheduler()
    prompt = scheduler.add(make_request(8))
    scheduler.release(prompt)
    scheduler.release(prompt)
    assert next_plan(scheduler) is None
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("num_tokens", [8, 40])
def test_prompt_that_the_ranks_refuse_fails_alone_and_is_not_cached(num_tokens: int) -> None:
    scheduler = make_scheduler()
    bad, good = scheduler.add(make_request(num_tokens)), scheduler.add(make_request(4, start=1))
    plan = next_plan(scheduler)
    assert plan is not None
    bad_row, good_row = bad.row, good.row
    scheduler.complete(StepResult(0, [SampledToken(bad_row, -1, error="nan"), SampledToken(good_row, 5)], 1))
    failed = [event for event in scheduler.take_events() if isinstance(event, PromptFailed)]
    assert failed == [PromptFailed(bad, "nan")]
    assert good.state is PromptState.COMPUTED
    assert next_plan(scheduler) is None
    scheduler.release(bad)
    scheduler.release(good)
    assert_nothing_is_held(scheduler)
    assert scheduler.kv.stats().num_cached == 1


def test_result_without_the_token_of_a_finished_prompt_is_an_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(4))
    next_plan(scheduler)
    with pytest.raises(InternalError, match="no token"):
        scheduler.complete(StepResult(0, [], 1))


def test_reading_from_free_blocks_is_an_error() -> None:
    scheduler = make_scheduler()
    prompt = scheduler.add(make_request(4))
    with pytest.raises(InternalError):
        scheduler.begin_read(prompt)


def test_step_must_have_room_for_two_blocks() -> None:
    with pytest.raises(InvalidArgument):
        make_scheduler(SchedulerLimits(max_rows=1, max_step_tokens=7, max_waiting=1))
