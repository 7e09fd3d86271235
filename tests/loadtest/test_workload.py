"""A workload is the same each time it is gone through, ends where it should, and never exceeds the model's context."""

from __future__ import annotations

import itertools

import pytest

from common.errors import InvalidArgument
from loadtest.arrivals import Arrivals
from loadtest.lengths import Fixed, LogNormal, Uniform
from loadtest.pacing import ClosedLoop, TraceTimes
from loadtest.sizes import RandomSizes, Size, TraceSizes
from loadtest.traces import Trace, TraceRow
from loadtest.workload import Workload, check

_TRACE = Trace("t.jsonl", 20, tuple(TraceRow(i * 0.5, 1000 * (i + 1), 10 * (i + 1), (0, i)) for i in range(6)))
_SIZES = RandomSizes(Uniform(10, 20), Fixed(5))


def test_a_workload_is_the_same_each_time() -> None:
    workload = Workload(Arrivals(5.0), RandomSizes(LogNormal(50, 1), Uniform(1, 9)), seed=3, num_requests=40)
    assert list(workload) == list(workload)
    assert [request.index for request in workload] == list(range(40))
    assert {request.max_tokens for request in workload} == set(range(1, 10))


def test_more_requests_of_a_workload_begin_with_the_same_ones() -> None:
    short, long = (list(Workload(Arrivals(5.0), _SIZES, seed=3, num_requests=count)) for count in (20, 3000))
    assert long[:20] == short


def test_a_duration_ends_what_arrives_but_not_before_the_last() -> None:
    requests = list(Workload(Arrivals(4.0, cv=0.0), _SIZES, seed=0, duration_s=2.0))
    assert [request.due_s for request in requests] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_a_trace_brings_times_lengths_and_blocks_scaled_as_told() -> None:
    workload = Workload(TraceTimes(_TRACE, rate_scale=2.0), TraceSizes(_TRACE, length_scale=0.1), seed=0)
    third = list(workload)[2]
    assert (third.due_s, third.num_prompt_tokens, third.max_tokens, third.block_ids) == (0.5, 300, 3, (0, 2))
    assert workload.sizes.block_tokens == pytest.approx(51.2)
    assert workload.describe_scaling(6, 0) == ("rate × 2", "lengths × 0.1")
    assert Workload(TraceTimes(_TRACE), TraceSizes(_TRACE), seed=0).describe_scaling(6, 0) == ()


def test_rows_that_were_spread_are_counted_where_their_times_are_used() -> None:
    rows = (TraceRow(0.0, 10, 2, is_spread=True), TraceRow(0.5, 10, 2, is_spread=True), TraceRow(1.0, 10, 2))
    trace = Trace("t.jsonl", 0, rows)
    with_times = Workload(TraceTimes(trace), TraceSizes(trace), seed=0).describe()
    assert with_times == (
        "the trace's own times, 2 of 3 rows shared a timestamp and were spread up to the next; t.jsonl, rows 0-2"
    )
    assert "spread" not in Workload(Arrivals(1.0), TraceSizes(trace), seed=0, num_requests=3).describe()


def test_lengths_of_a_trace_go_with_other_arrivals() -> None:
    requests = list(Workload(Arrivals(1.0, cv=0.0), TraceSizes(_TRACE), seed=0, num_requests=4))
    assert [(r.due_s, r.num_prompt_tokens) for r in requests] == [(0.0, 1000), (1.0, 2000), (2.0, 3000), (3.0, 4000)]


def test_a_trace_that_is_too_short_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(InvalidArgument, match="at most 6"):
        check(Workload(Arrivals(1.0), TraceSizes(_TRACE), seed=0, num_requests=7), None)
    with pytest.raises(InvalidArgument, match="do not last that long"):
        check(Workload(Arrivals(1.0, cv=0.0), TraceSizes(_TRACE), seed=0, duration_s=6.5), None)
    assert check(Workload(Arrivals(1.0, cv=0.0), TraceSizes(_TRACE), seed=0, duration_s=6.0), None).num_requests == 6
    with pytest.raises(InvalidArgument, match="at most 6"):
        check(Workload(TraceTimes(_TRACE), TraceSizes(_TRACE), seed=0, num_requests=7), None)


def test_what_the_context_cannot_hold_is_refused_naming_the_row() -> None:
    workload = Workload(TraceTimes(_TRACE), TraceSizes(_TRACE), seed=0)
    assert check(workload, 6060).num_requests == 6
    with pytest.raises(InvalidArgument) as refused:
        check(workload, 4040)
    assert refused.value.field == "t.jsonl, row 24"
    assert "5000 + 50 tokens" in refused.value.value
    assert "4040" in refused.value.limit


def test_clipping_keeps_the_beginning_and_the_output_and_is_counted() -> None:
    workload = Workload(TraceTimes(_TRACE), TraceSizes(_TRACE), seed=0, clip_tokens=4040)
    plan = check(workload, 4040)
    assert plan.num_clipped == 2
    assert workload.describe_scaling(plan.num_requests, plan.num_clipped) == (
        "2 of 6 requests clipped to the context of 4040 tokens",
    )
    assert [(r.num_prompt_tokens, r.max_tokens) for r in workload][-2:] == [(3990, 50), (3980, 60)]
    assert Size(5, 100).clipped(64) == Size(1, 63)


def test_a_closed_loop_may_be_ended_by_the_clock_alone() -> None:
    workload = Workload(ClosedLoop(3), _SIZES, seed=0, duration_s=10.0)
    assert workload.is_endless
    assert check(workload, 25).num_requests is None
    assert len(list(itertools.islice(workload, 5000))) == 5000
    with pytest.raises(InvalidArgument, match="up to 25 tokens"):
        check(workload, 24)
    unbounded = RandomSizes(LogNormal(10, 1), Fixed(5))
    with pytest.raises(InvalidArgument, match="without bound"):
        check(Workload(ClosedLoop(3), unbounded, seed=0, duration_s=10.0), 100_000)
    check(Workload(ClosedLoop(3), unbounded, seed=0, duration_s=10.0, clip_tokens=100), 100)


def test_a_closed_loop_over_a_trace_ends_with_the_trace() -> None:
    workload = Workload(ClosedLoop(3), TraceSizes(_TRACE), seed=0, duration_s=10.0)
    assert check(workload, None).num_requests == 6
    assert not workload.is_endless


def test_warm_up_is_as_long_as_the_workload_and_shares_no_blocks() -> None:
    warm_up = list(Workload(TraceTimes(_TRACE), TraceSizes(_TRACE), seed=0).warm_up(8))
    assert [request.num_prompt_tokens for request in warm_up] == [1000, 2000, 3000, 4000, 5000, 6000, 1000, 2000]
    assert all(request.is_warmup and not request.block_ids for request in warm_up)


@pytest.mark.parametrize(
    ("num_requests", "duration_s"), [(0, None), (None, 0.0), (None, float("nan")), (None, float("inf")), (None, None)]
)
def test_a_run_without_an_end_is_refused(num_requests: int | None, duration_s: float | None) -> None:
    with pytest.raises(InvalidArgument):
        Workload(Arrivals(1.0), _SIZES, seed=0, num_requests=num_requests, duration_s=duration_s)
