"""Single stories of the scheduler: look-ahead, preemption, growth, the hand-off's blocks, and what is refused."""

from __future__ import annotations

import pytest

from common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from common.kvcache.kv_cache_manager import KVCacheManager
from common.worker.step_plan import AddRow, RemoveRow, SampledToken, StepPlan, StepResult, pack_tokens
from services.decode.plans import Plan
from services.decode.request import DecodeSequence, End, SequenceEnded, SequenceState, TokenSampled
from services.decode.scheduler import DecodeScheduler
from tests.decode.requests import EOS, make_request

BLOCK_SIZE = 4
ROUTER = "router"


def make_scheduler(num_blocks: int = 16, max_rows: int = 4, max_open: int = 8) -> DecodeScheduler:
    return DecodeScheduler(lambda: KVCacheManager(num_blocks, BLOCK_SIZE), max_rows, max_open, b"model")


def join(scheduler: DecodeScheduler, seq: DecodeSequence, first_token: int = 1) -> DecodeSequence:
    """The whole hand-off."""
    assert scheduler.reserve(seq)
    scheduler.verify(seq, range(seq.num_verified, seq.num_handoff_blocks))
    scheduler.join(seq, first_token, 0.0)
    return seq


def start(
    scheduler: DecodeScheduler, sequence_id: int, num_tokens: int, *, max_tokens: int = 8, num_output: int = 0
) -> DecodeSequence:
    """Open and hand off a sequence whose prompt nobody shares."""
    tokens = [sequence_id % 7, *range(num_tokens - 1)]
    request = make_request(sequence_id, tokens, max_tokens=max_tokens, num_output=num_output)
    return join(scheduler, scheduler.open(ROUTER, request, ticket_id=sequence_id))


def step_of(plan: Plan) -> StepPlan:
    assert plan.step is not None
    return plan.step


def result_of(plan: Plan, *token_ids: int) -> StepResult:
    step = step_of(plan)
    sampled = [SampledToken(segment.row, token) for segment, token in zip(step.segments, token_ids, strict=True)]
    return StepResult(step.step_id, sampled, 0)


def tokens_of(scheduler: DecodeScheduler) -> list[tuple[int, int]]:
    """(position, token) of the events so far."""
    return [(e.position, e.token_id) for e in scheduler.take_events() if isinstance(e, TokenSampled)]


def ends_of(scheduler: DecodeScheduler) -> dict[int, End]:
    return {e.key[1]: e.end for e in scheduler.take_events() if isinstance(e, SequenceEnded)}


def test_the_first_step_gets_row_blocks_and_the_token_of_prefill() -> None:
    scheduler = make_scheduler()
    seq = start(scheduler, 1, num_tokens=6, num_output=2)
    plan = scheduler.plan(0.0)
    (add,) = plan.messages
    assert isinstance(add, AddRow)
    assert (add.prompt_token_ids, add.output_token_ids) == (pack_tokens([1, 0, 1, 2]), pack_tokens([3, 4, 1]))
    (segment,) = step_of(plan).segments
    assert (segment.token_ids, segment.position, segment.output_index) == (None, 6, 3)
    assert segment.new_block_ids == seq.blocks.block_ids


def test_a_plan_is_made_while_another_runs_and_no_third() -> None:
    scheduler = make_scheduler()
    start(scheduler, 1, num_tokens=3)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert [step_of(plan).segments[0].position for plan in (first, second)] == [3, 4]
    assert scheduler.plan(0.0).step is None
    scheduler.complete(result_of(first, 5), 0.0)
    assert step_of(scheduler.plan(0.0)).segments[0].position == 5


def test_a_stop_seen_one_step_late_costs_one_discarded_token() -> None:
    scheduler = make_scheduler()
    start(scheduler, 1, num_tokens=3)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert scheduler.complete(result_of(first, EOS), 0.0) == 0
    assert scheduler.complete(result_of(second, 5), 0.0) == 1
    events = scheduler.take_events()
    assert [e.token_id for e in events if isinstance(e, TokenSampled)] == [EOS]
    assert [e.end for e in events if isinstance(e, SequenceEnded)] == [End.FINISHED]
    assert scheduler.plan(0.0).messages == [RemoveRow(0)]


def test_no_step_is_planned_beyond_max_tokens() -> None:
    scheduler = make_scheduler()
    start(scheduler, 1, num_tokens=3, max_tokens=2)
    first = scheduler.plan(0.0)
    assert scheduler.plan(0.0).step is None
    scheduler.complete(result_of(first, 5), 0.0)
    assert ends_of(scheduler) == {1: End.FINISHED}


@pytest.mark.parametrize("way_out", ["close", "stop", "expire"])
def test_blocks_of_a_sequence_that_is_gone_stay_held_until_its_last_plan_is_done(way_out: str) -> None:
    scheduler = make_scheduler()
    seq = start(scheduler, 1, num_tokens=3)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    if way_out == "close":
        scheduler.close(seq.key)
    elif way_out == "expire":
        scheduler.expire(2e9)
    scheduler.complete(result_of(first, EOS), 0.0)
    assert scheduler.num_open == 0
    assert scheduler.kv_stats().num_held == 2
    scheduler.complete(result_of(second, 5), 0.0)
    assert scheduler.kv_stats().num_held == 0


@pytest.mark.parametrize(("closed_s", "end"), [(99.0, End.DEADLINE), (97.0, End.CLOSED)])
def test_a_sequence_that_is_closed_when_its_time_is_up_is_late(closed_s: float, end: End) -> None:
    """The router's clock, and that of a prefill worker, may be a little ahead."""
    scheduler = make_scheduler()
    seq = scheduler.open(ROUTER, make_request(1, range(6), deadline_s=100.0), ticket_id=1, now_s=0.0)
    assert scheduler.close(seq.key, closed_s)
    assert ends_of(scheduler) == {1: end}


def test_blocks_stay_held_while_a_transfer_may_write_to_them() -> None:
    scheduler = make_scheduler()
    seq = scheduler.open(ROUTER, make_request(1, range(6)), ticket_id=1)
    assert scheduler.reserve(seq)
    scheduler.hold(seq)
    scheduler.close(seq.key)
    assert scheduler.kv_stats().num_held == 2
    scheduler.release_hold(seq)
    assert scheduler.kv_stats().num_held == 0


def test_the_youngest_gives_way_and_what_was_under_way_for_it_is_discarded() -> None:
    scheduler = make_scheduler(num_blocks=5)
    start(scheduler, 1, num_tokens=4)
    start(scheduler, 2, num_tokens=3)
    start(scheduler, 3, num_tokens=3)
    plan = scheduler.plan(0.0)  # the oldest takes a block
    ahead = scheduler.plan(0.0)  # the next takes the last one
    assert [len(step_of(each).segments) for each in (plan, ahead)] == [3, 2]
    assert ends_of(scheduler) == {3: End.PREEMPTED}
    assert scheduler.complete(result_of(plan, 5, 5, 5), 0.0) == 1
    assert scheduler.complete(result_of(ahead, 6, 6), 0.0) == 0
    assert tokens_of(scheduler) == [(1, 5), (1, 5), (2, 6), (2, 6)]


def test_a_sequence_sits_out_while_blocks_of_the_preempted_are_on_their_way_back() -> None:
    scheduler = make_scheduler(num_blocks=5)
    old = start(scheduler, 1, num_tokens=3)
    middle = start(scheduler, 2, num_tokens=3)
    start(scheduler, 3, num_tokens=4)
    plan = scheduler.plan(0.0)  # the youngest takes a block
    ahead = scheduler.plan(0.0)  # the oldest takes the last, the next finds none
    assert [segment.row for segment in step_of(ahead).segments] == [old.row]
    assert ends_of(scheduler) == {3: End.PREEMPTED}
    scheduler.complete(result_of(plan, 5, 5, 5), 0.0)
    assert [segment.row for segment in step_of(scheduler.plan(0.0)).segments] == [old.row, middle.row]
    assert middle.state is SequenceState.RUNNING


def test_a_newcomer_leaves_a_block_for_each_running_sequence() -> None:
    scheduler = make_scheduler(num_blocks=4)
    first = start(scheduler, 1, num_tokens=3)
    second = scheduler.open(ROUTER, make_request(2, range(9)), ticket_id=2)
    assert not scheduler.reserve(second)
    scheduler.close(first.key)
    assert second.state is SequenceState.RECEIVING


def test_blocks_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    scheduler = make_scheduler(num_blocks=4)
    running = start(scheduler, 1, num_tokens=8)
    large = scheduler.open(ROUTER, make_request(2, range(12), max_tokens=4), ticket_id=2)
    small = scheduler.open(ROUTER, make_request(3, [9, 9, 9]), ticket_id=3)
    assert not scheduler.reserve(large)
    assert not scheduler.reserve(small), "a small one does not overtake"
    scheduler.close(running.key)
    assert (large.state, small.state) == (SequenceState.RECEIVING, SequenceState.OPEN)


def test_open_sequences_that_only_hold_cached_blocks_cannot_block_the_pool() -> None:
    scheduler = make_scheduler(num_blocks=4)
    prompt = list(range(13))
    scheduler.close(join(scheduler, scheduler.open(ROUTER, make_request(1, prompt, max_tokens=2), 1)).key)
    holder = scheduler.open(ROUTER, make_request(2, prompt, max_tokens=2), ticket_id=2)
    assert holder.blocks.num_cached_blocks == 3
    other = scheduler.open(ROUTER, make_request(3, [9] * 13, max_tokens=2), ticket_id=3)
    scheduler.take_events()
    assert scheduler.reserve(other)
    assert ends_of(scheduler) == {2: End.PREEMPTED}


def test_two_that_received_the_same_prompt_at_once_do_not_wedge_the_pool() -> None:
    """The second keeps its own copy and holds the published one, too: more than the pool has when it grows."""
    scheduler = make_scheduler(num_blocks=4)
    twins = [scheduler.open(ROUTER, make_request(i, range(4), max_tokens=12), ticket_id=i) for i in (1, 2)]
    for seq in twins:
        assert scheduler.reserve(seq)
    for seq in twins:
        scheduler.finalize(seq, 1)
        scheduler.verify(seq, [0])
        scheduler.join(seq, 1, 0.0)
    scheduler.close(twins[0].key)
    for _ in range(24):
        plan = scheduler.plan(0.0)
        if plan.step is None:
            break
        scheduler.complete(result_of(plan, 5), 0.0)
    assert ends_of(scheduler)[2] in (End.PREEMPTED, End.FINISHED)
    assert scheduler.num_open == 0


def test_verified_blocks_of_a_broken_hand_off_are_found_by_the_next() -> None:
    scheduler = make_scheduler()
    seq = scheduler.open(ROUTER, make_request(1, range(14)), ticket_id=1)
    scheduler.reserve(seq)
    scheduler.finalize(seq, 4)
    scheduler.verify(seq, [0])
    scheduler.verify(seq, [2])  # out of order: block 1 is missing
    scheduler.close(seq.key)
    again = scheduler.open(ROUTER, make_request(2, range(14)), ticket_id=2)
    assert again.blocks.num_cached_blocks == 1


@pytest.mark.parametrize("is_final_first", [True, False])
def test_only_blocks_whose_computation_was_right_are_cached(is_final_first: bool) -> None:
    scheduler = make_scheduler()
    seq = scheduler.open(ROUTER, make_request(1, range(14)), ticket_id=1)
    scheduler.reserve(seq)
    if is_final_first:
        scheduler.finalize(seq, 1)
    scheduler.verify(seq, [0, 1, 2])
    scheduler.finalize(seq, 1)
    scheduler.close(seq.key)
    again = scheduler.open(ROUTER, make_request(2, range(14)), ticket_id=2)
    assert again.blocks.num_cached_blocks == 1


def test_the_output_is_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    start(scheduler, 1, num_tokens=4, max_tokens=6)
    for token in (2, 3, 4, 5, 6):
        plan = scheduler.plan(0.0)
        scheduler.complete(result_of(plan, token), 0.0)
    assert ends_of(scheduler) == {1: End.FINISHED}
    turn = [1, 0, 1, 2, 1, 2, 3, 4, 5, 6, 9]
    again = scheduler.open(ROUTER, make_request(2, turn), ticket_id=2)
    assert again.blocks.num_cached_blocks == 2


def test_a_failed_row_ends_its_sequence_only() -> None:
    scheduler = make_scheduler()
    start(scheduler, 1, num_tokens=3)
    start(scheduler, 2, num_tokens=3)
    plan = scheduler.plan(0.0)
    rows = [segment.row for segment in step_of(plan).segments]
    sampled = [SampledToken(rows[0], -1, error="logits are not finite"), SampledToken(rows[1], 5)]
    scheduler.complete(StepResult(step_of(plan).step_id, sampled, 0), 0.0)
    events = scheduler.take_events()
    assert [(e.key[1], e.error) for e in events if isinstance(e, SequenceEnded)] == [(1, "logits are not finite")]
    assert [e.key[1] for e in events if isinstance(e, TokenSampled)] == [2]


def test_losing_the_ranks_ends_everything_and_forgets_the_cache() -> None:
    scheduler = make_scheduler()
    start(scheduler, 1, num_tokens=9)
    receiving = scheduler.open(ROUTER, make_request(2, range(9)), ticket_id=2)
    scheduler.reserve(receiving)
    scheduler.hold(receiving)
    scheduler.plan(0.0)
    scheduler.lose_all()
    scheduler.release_hold(receiving)
    assert ends_of(scheduler) == {1: End.LOST, 2: End.LOST}
    stats = scheduler.kv_stats()
    assert (stats.num_free, stats.num_cached, stats.num_held) == (16, 0, 0)
    start(scheduler, 3, num_tokens=3)
    assert len(step_of(scheduler.plan(0.0)).segments) == 1


def test_join_needs_every_block() -> None:
    scheduler = make_scheduler()
    seq = scheduler.open(ROUTER, make_request(1, range(9)), ticket_id=1)
    scheduler.reserve(seq)
    scheduler.verify(seq, [0, 1])
    with pytest.raises(FailedPrecondition, match="2 of 3 blocks"):
        scheduler.join(seq, 1, 0.0)


def test_what_cannot_fit_alone_is_refused_with_the_limit() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.open(ROUTER, make_request(1, range(5), max_tokens=4), ticket_id=1)
    with pytest.raises(InvalidArgument, match=r"sampling\.max_tokens = 5: at most 4"):
        scheduler.open(ROUTER, make_request(2, range(5), max_tokens=5), ticket_id=2)
    with pytest.raises(InvalidArgument, match="at most 8 tokens fit"):
        scheduler.open(ROUTER, make_request(3, range(9)), ticket_id=3)


def test_too_many_open_sequences_are_refused() -> None:
    scheduler = make_scheduler(max_open=1)
    scheduler.open(ROUTER, make_request(1, range(3)), ticket_id=1)
    with pytest.raises(ResourceExhausted):
        scheduler.open(ROUTER, make_request(2, range(3)), ticket_id=2)
    assert scheduler.num_open == 1


def test_a_sequence_is_open_once() -> None:
    scheduler = make_scheduler()
    scheduler.open(ROUTER, make_request(1, range(3)), ticket_id=1)
    with pytest.raises(InvalidArgument, match="is open already"):
        scheduler.open(ROUTER, make_request(1, range(3)), ticket_id=2)
    scheduler.open("another router", make_request(1, range(3)), ticket_id=3)


def test_times_of_queue_and_decode_come_with_the_end() -> None:
    scheduler = make_scheduler()
    seq = scheduler.open(ROUTER, make_request(1, range(3), max_tokens=2), ticket_id=1)
    scheduler.reserve(seq)
    scheduler.verify(seq, [0])
    scheduler.join(seq, 1, now_s=10.0)
    plan = scheduler.plan(12.0)
    scheduler.complete(result_of(plan, 5), 15.0)
    (end,) = (event for event in scheduler.take_events() if isinstance(event, SequenceEnded))
    assert (end.decode_queue_ns, end.decode_ns) == (2_000_000_000, 3_000_000_000)
    assert scheduler.row_s == pytest.approx(3.0 / 4)


def test_as_many_decode_at_once_as_find_blocks() -> None:
    scheduler = make_scheduler(num_blocks=4)
    start(scheduler, 1, 5)
    assert scheduler.num_at_once == 4
    scheduler.reserve(scheduler.open(ROUTER, make_request(2, range(7)), ticket_id=2))
    assert scheduler.num_waiting_for_blocks == 1
    assert scheduler.num_at_once == 1
