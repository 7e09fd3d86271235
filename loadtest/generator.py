"""One load test from beginning to end: look at the target, warm it up, send the workload, hand back the run.

The sending itself is done by client processes; this one only deals requests, collects records and watches the pools.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from common.errors import InternalError, InvalidArgument, Unavailable
from common.rpc.status import find_baton_error
from loadtest.client_group import client_group
from loadtest.client_messages import ClientSpec
from loadtest.clock import MonotonicClock
from loadtest.machine import describe_machine
from loadtest.pool_sampler import check_workers, sample_pools
from loadtest.prompts import PromptMaker, PromptSpec
from loadtest.record import Arrival, PoolSample, RequestRecord, Run, RunInfo
from loadtest.sender import Sender, SendOptions
from loadtest.targets.base import ModelInfo, TargetSpec
from loadtest.targets.registry import open_target
from loadtest.workload import Plan, PlannedRequest, Workload, check

_HEAD_START_S = 0.25  # for the client processes to make their first requests ready
_GRACE_S = 30.0  # after the last request must have ended, before the client processes are given up
_STOP_S = 10.0  # from being told to stop to the end of the client processes
_WARMUP_CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class LoadTest:
    """Everything that a run is made from."""

    target: TargetSpec
    model: ModelInfo
    workload: Workload
    timeout_s: float = 600.0  # of a request, from when it is due
    num_warmup: int = 0
    num_processes: int = 1
    max_in_flight: int = 1024  # in each process
    worker_addresses: tuple[str, ...] = ()  # Baton's workers, to be sampled
    command: str = ""
    case: str = ""  # what this run is called where several are compared

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise InvalidArgument("timeout", self.timeout_s, "seconds, above 0")
        for name, value, least in (
            ("warmup", self.num_warmup, 0),
            ("processes", self.num_processes, 1),
            ("max in flight", self.max_in_flight, 1),
            ("connections", self.target.num_connections, 1),
        ):
            if value < least:
                raise InvalidArgument(name, value, f"at least {least}")
        if (concurrency := self.workload.concurrency) is not None and concurrency < self.num_processes:
            raise InvalidArgument("processes", self.num_processes, f"at most {concurrency}, the concurrency")


@dataclass(slots=True)
class Observed:
    """What has been seen of a run so far. The generator adds to it; whoever shows progress reads it."""

    warmup: list[RequestRecord] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)
    samples: list[PoolSample] = field(default_factory=list)
    num_planned: int | None = None  # None: only the clock ends the run
    num_clipped: int = 0
    num_failed: int = 0
    warmup_s: float = 0.0  # of the monotonic clock: when the warm-up began
    started_s: float | None = None  # of the same clock: 0 of the run's; None before
    started_at: str = ""  # that moment as ISO 8601

    def add(self, record: RequestRecord) -> None:
        """Take the record of a request that has ended."""
        (self.warmup if record.is_warmup else self.records).append(record)
        self.num_failed += not record.is_ok


async def describe_target(spec: TargetSpec) -> ModelInfo:
    """What the target serves; fails if it cannot be reached."""
    async with open_target(spec) as target:
        return await target.describe()


async def run_load_test(test: LoadTest, stop: asyncio.Event, observed: Observed) -> Run:
    """Run it. Setting `stop` ends it early: what is in flight is recorded as `Interrupted`, the run says so.

    If it fails, or is cancelled, no process is left and what was recorded by then is in `observed`. A warm-up of which
    nothing came ends it as `Unavailable`: no figure could come of the run.
    """
    plan = check(test.workload, test.model.context_length)
    observed.num_planned, observed.num_clipped = plan.num_requests, plan.num_clipped
    await check_workers(test.worker_addresses)
    clock = MonotonicClock()
    observed.warmup_s = clock.now_s()
    try:
        if test.num_warmup:
            await _warm_up(test, clock, stop, observed)
            _check_warmed_up(observed, stop)
        if not stop.is_set():
            await _measure(test, plan, clock, stop, observed)
    except BaseExceptionGroup as group:
        # Two tasks may have failed of the same thing; the first is what the user wants to know.
        raise find_baton_error(group) or group from group
    return observed_run(test, observed, was_interrupted=stop.is_set())


def observed_run(test: LoadTest, observed: Observed, *, was_interrupted: bool, failure: str = "") -> Run:
    """What has been seen, as a run. `failure` is what cut it short."""
    start_s = observed.warmup_s if observed.started_s is None else observed.started_s
    warmup = [_later(record, observed.warmup_s - start_s) for record in observed.warmup]
    records = sorted(observed.records, key=lambda record: record.index)
    info = msgspec.structs.replace(_run_info(test, observed, records), was_interrupted=was_interrupted, failure=failure)
    return Run(info=info, records=(*warmup, *records), samples=tuple(observed.samples))


async def _warm_up(test: LoadTest, clock: MonotonicClock, stop: asyncio.Event, observed: Observed) -> None:
    """Requests that are sent and waited for before the clock starts, from this process."""
    options = SendOptions(test.timeout_s, test.max_in_flight, min(_WARMUP_CONCURRENCY, test.num_warmup))
    async with open_target(test.target) as target, asyncio.TaskGroup() as tasks:
        await target.describe()
        sender = Sender(target, PromptMaker(_prompt_spec(test)), clock, options, observed.add)
        stopping = tasks.create_task(_stop_when_told(stop, sender.stop))
        await sender.run(_one_by_one(test.workload.warm_up(test.num_warmup)), clock.now_s())
        stopping.cancel()


def _check_warmed_up(observed: Observed, stop: asyncio.Event) -> None:
    if observed.warmup and not stop.is_set() and not any(record.is_ok for record in observed.warmup):
        last = observed.warmup[-1]
        what = f"all {len(observed.warmup)} warm-up requests failed"
        raise Unavailable(f"{what}, the last with {last.outcome}: {last.detail}")


async def _measure(test: LoadTest, plan: Plan, clock: MonotonicClock, stop: asyncio.Event, observed: Observed) -> None:
    """Send the workload with the client processes."""
    async with client_group(_client_specs(test)) as group:
        start_s = observed.started_s = clock.now_s() + _HEAD_START_S
        observed.started_at = _now_iso()
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(_stop_when_told(stop, group.stop))]
            if test.worker_addresses:
                sampling = sample_pools(test.worker_addresses, clock, start_s, observed.samples.append)
                beside.append(tasks.create_task(sampling))
            await group.run(test.workload, start_s, start_s + _longest_s(test, plan), observed.add)
            for task in beside:
                task.cancel()


async def _stop_when_told(stop: asyncio.Event, stop_sending: Callable[[], None]) -> None:
    await stop.wait()
    stop_sending()
    await asyncio.sleep(_STOP_S)
    raise InternalError(f"requests are still in flight {_STOP_S:g} s after the run was stopped")


async def _one_by_one(requests: Iterable[PlannedRequest]) -> AsyncIterator[PlannedRequest]:
    for request in requests:
        yield request


def _client_specs(test: LoadTest) -> list[ClientSpec]:
    """One for each process; a closed loop's places are dealt out evenly."""
    specs = []
    for position in range(test.num_processes):
        concurrency = test.workload.concurrency
        if concurrency is not None:
            concurrency = len(range(position, concurrency, test.num_processes))
        options = SendOptions(test.timeout_s, test.max_in_flight, concurrency, test.workload.duration_s)
        specs.append(ClientSpec(test.target, _prompt_spec(test), options))
    return specs


def _prompt_spec(test: LoadTest) -> PromptSpec:
    workload, model = test.workload, test.model
    return PromptSpec(workload.seed, model.vocab_size, workload.sizes.block_tokens, model.eos_token_ids)


def _longest_s(test: LoadTest, plan: Plan) -> float:
    """How long the run can last if every request takes until its deadline."""
    workload = test.workload
    if workload.concurrency is None:
        return plan.last_due_s + test.timeout_s + _GRACE_S
    rounds_s = math.inf if plan.num_requests is None else plan.num_requests / workload.concurrency * test.timeout_s
    duration_s = math.inf if workload.duration_s is None else workload.duration_s
    return min(rounds_s, duration_s) + test.timeout_s + _GRACE_S


def _later(record: RequestRecord, by_s: float) -> RequestRecord:
    """The same record by a clock that started `by_s` earlier."""
    return msgspec.structs.replace(
        record,
        due_s=record.due_s + by_s,
        sent_s=record.sent_s + by_s,
        ended_s=record.ended_s + by_s,
        arrivals=tuple(Arrival(arrival.at_s + by_s, arrival.num_tokens) for arrival in record.arrivals),
    )


def _now_iso() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _run_info(test: LoadTest, observed: Observed, records: list[RequestRecord]) -> RunInfo:
    span_s = max(r.ended_s for r in records) - min(r.due_s for r in records) if records else 0.0
    return RunInfo(
        target=test.target.address,
        kind=test.target.kind,
        model=test.model.name,
        machine=describe_machine(),
        started_at=observed.started_at or _now_iso(),
        command=test.command,
        workload=test.workload.describe(),
        seed=test.workload.seed,
        scaling=test.workload.describe_scaling(observed.num_planned, observed.num_clipped),
        case=test.case,
        duration_s=span_s,
        num_processes=test.num_processes,
    )
