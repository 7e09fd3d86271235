"""The sender keeps to its plan whatever the target does. On a virtual clock, so every time is exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from common.errors import ResourceExhausted
from loadtest.prompts import PromptMaker, PromptSpec
from loadtest.record import RequestRecord
from loadtest.sender import Sender, SendOptions
from loadtest.targets.base import Account
from loadtest.workload import PlannedRequest
from tests.loadtest.fake_target import FakeTarget
from tests.loadtest.virtual_loop import LoopClock, run_virtually

_START_S = 5.0


async def _plan(requests: Iterable[PlannedRequest]) -> AsyncIterator[PlannedRequest]:
    for request in requests:
        yield request


def _every(gap_s: float, count: int, max_tokens: int = 3) -> list[PlannedRequest]:
    return [PlannedRequest(index, index * gap_s, 8, max_tokens) for index in range(count)]


async def _run(
    target: FakeTarget, plan: list[PlannedRequest], options: SendOptions, stop_at_s: float | None = None
) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    sender = Sender(target, PromptMaker(PromptSpec(0, 1000, 512)), LoopClock(), options, records.append)
    if stop_at_s is not None:
        asyncio.get_running_loop().call_at(_START_S + stop_at_s, sender.stop)
    await sender.run(_plan(plan), _START_S)
    return sorted(records, key=lambda record: record.index)


def _outcomes(records: list[RequestRecord]) -> list[str]:
    return [record.outcome for record in records]


def test_requests_go_out_when_due_however_slow_the_answers_are() -> None:
    target = FakeTarget(first_s=10.0)
    records = run_virtually(_run(target, _every(0.5, 20), SendOptions(60.0, 100)))
    assert [record.sent_s for record in records] == pytest.approx([index * 0.5 for index in range(20)])
    assert target.most_open == 20
    assert set(_outcomes(records)) == {"ok"}
    assert [body.request_id for body in target.bodies[:2]] == ["load-0", "load-1"]


def test_every_arrival_is_recorded_by_the_runs_clock() -> None:
    target = FakeTarget(account=Account(num_cached_tokens=4, lifetime_ns={"queue_ns": 9}))
    (record,) = run_virtually(_run(target, [PlannedRequest(0, 2.0, 8, 3)], SendOptions(60.0, 100)))
    assert [arrival.at_s for arrival in record.arrivals] == pytest.approx([2.1, 2.11, 2.12])
    assert record.time_to_first_token_s == pytest.approx(0.1)
    assert record.ended_s == pytest.approx(2.12)
    assert (record.num_cached_tokens, record.lifetime_ns) == (4, {"queue_ns": 9})
    assert len(target.bodies[0].token_ids) == 8


def test_a_request_sent_late_counts_from_when_it_was_due() -> None:
    plan = [PlannedRequest(0, -7.0, 8, 1)]
    (record,) = run_virtually(_run(FakeTarget(), plan, SendOptions(60.0, 100)))
    assert (record.due_s, record.sent_s) == (-7.0, -5.0)
    assert record.time_to_first_token_s == pytest.approx(2.1)


def test_too_many_in_flight_is_recorded_and_delays_nobody() -> None:
    target = FakeTarget(first_s=2.25)
    records = run_virtually(_run(target, _every(1.0, 6, max_tokens=1), SendOptions(60.0, max_in_flight=2)))
    assert _outcomes(records) == ["ok", "ok", "GeneratorOverloaded"] * 2
    assert target.most_open == 2
    assert [record.sent_s for record in records] == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert not records[2].arrivals


def test_a_target_that_stalls_ends_at_the_deadline_with_what_had_come() -> None:
    target = FakeTarget(first_s=0.5, gap_s=100.0)
    (record,) = run_virtually(_run(target, _every(1.0, 1), SendOptions(3.0, 100)))
    assert record.outcome == "DeadlineExceeded"
    assert record.ended_s == pytest.approx(3.0)
    assert record.num_output_tokens == 1
    assert target.num_open == 0


def test_the_deadline_counts_from_when_the_request_was_due() -> None:
    (record,) = run_virtually(_run(FakeTarget(first_s=5.0), [PlannedRequest(0, -7.0, 8, 1)], SendOptions(3.0, 100)))
    assert record.outcome == "DeadlineExceeded"
    assert record.ended_s == pytest.approx(-4.0)


def test_an_error_ends_one_request_by_its_name() -> None:
    target = FakeTarget(error=ResourceExhausted("the queue is full"))
    records = run_virtually(_run(target, _every(1.0, 3), SendOptions(60.0, 100)))
    assert _outcomes(records) == ["ResourceExhausted"] * 3
    assert records[0].detail == "the queue is full"
    assert records[0].num_output_tokens == 3


def test_an_answer_without_a_token_is_no_success() -> None:
    plan = [PlannedRequest(0, 0.0, 8, 0)]
    (record,) = run_virtually(_run(FakeTarget(), plan, SendOptions(60.0, 100)))
    assert record.outcome == "InternalError"


def test_stopping_sends_nothing_more_and_ends_what_is_in_flight() -> None:
    target = FakeTarget(first_s=1.5)
    records = run_virtually(_run(target, _every(1.0, 100, max_tokens=1), SendOptions(60.0, 100), stop_at_s=3.25))
    assert _outcomes(records) == ["ok", "ok", "Interrupted", "Interrupted"]
    assert [record.ended_s for record in records[2:]] == pytest.approx([3.25, 3.25])
    assert target.num_open == 0


def test_stopping_before_the_start_sends_nothing() -> None:
    async def stop_first() -> list[RequestRecord]:
        records: list[RequestRecord] = []
        options = SendOptions(60.0, 100)
        sender = Sender(FakeTarget(), PromptMaker(PromptSpec(0, 1000, 512)), LoopClock(), options, records.append)
        sender.stop()
        await sender.run(_plan(_every(0.0, 3)), _START_S)
        return records

    assert run_virtually(stop_first()) == []


def test_a_closed_loop_keeps_so_many_in_flight_and_makes_each_due_when_its_place_is_free() -> None:
    target = FakeTarget(first_s=1.0)
    records = run_virtually(_run(target, _every(0.0, 8, max_tokens=1), SendOptions(60.0, 100, concurrency=3)))
    assert _outcomes(records) == ["ok"] * 8
    assert target.most_open == 3
    assert [record.due_s for record in records] == pytest.approx([0.0] * 3 + [1.0] * 3 + [2.0] * 2)
    assert [record.ended_s - record.due_s for record in records] == pytest.approx([1.0] * 8)


def test_a_closed_loop_stops_sending_by_the_clock_but_waits_for_answers() -> None:
    target = FakeTarget(first_s=1.0)
    options = SendOptions(60.0, 100, concurrency=2, stop_sending_s=2.5)
    records = run_virtually(_run(target, _every(0.0, 5000, max_tokens=1), options))
    assert _outcomes(records) == ["ok"] * 6
    assert records[-1].ended_s == pytest.approx(3.0)


def test_a_closed_loop_stops_when_told() -> None:
    target = FakeTarget(first_s=1.0)
    options = SendOptions(60.0, 100, concurrency=2)
    records = run_virtually(_run(target, _every(0.0, 5000, max_tokens=1), options, stop_at_s=2.5))
    assert _outcomes(records) == ["ok"] * 4 + ["Interrupted"] * 2
