"""Whole load tests with real client processes against real servers, from warm-up to the finished run."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import psutil  # type: ignore[import-untyped]
import pytest

from common.errors import InternalError, InvalidArgument, ResourceExhausted, Unavailable
from loadtest import client_group
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, run_load_test
from loadtest.lengths import Fixed
from loadtest.pacing import ClosedLoop, TraceTimes
from loadtest.record import Run
from loadtest.sizes import RandomSizes, TraceSizes
from loadtest.targets.base import ModelInfo, TargetSpec
from loadtest.traces import Trace, TraceRow
from loadtest.workload import Pacing, Workload
from tests.loadtest import fake_inference, fake_openai
from tests.loadtest.fake_inference import FakeInference
from tests.loadtest.fake_openai import FakeOpenAI

_SIZES = RandomSizes(Fixed(16), Fixed(3))


def _workload(pacing: Pacing, num_requests: int) -> Workload:
    return Workload(pacing, _SIZES, seed=1, num_requests=num_requests)


async def _load_test(
    fake: FakeInference | FakeOpenAI,
    workload: Workload,
    *,
    timeout_s: float = 20.0,
    num_warmup: int = 0,
    num_processes: int = 1,
    worker_addresses: tuple[str, ...] = (),
) -> LoadTest:
    kind = "baton" if isinstance(fake, FakeInference) else "openai"
    target = TargetSpec(kind, fake.address, vocab_size=900)
    model = await describe_target(target)
    return LoadTest(target, model, workload, timeout_s, num_warmup, num_processes, 64, worker_addresses, "command")


async def _run(test: LoadTest) -> Run:
    return await run_load_test(test, asyncio.Event(), Observed())


def _outcomes(run: Run) -> Counter[str]:
    return Counter(record.outcome for record in run.records)


async def test_two_processes_share_an_open_loop_after_a_warm_up() -> None:
    async with fake_inference.serving(FakeInference()) as fake:
        workload = _workload(Arrivals(60.0), 30)
        test = await _load_test(fake, workload, num_warmup=3, num_processes=2, worker_addresses=(fake.address,))
        run = await _run(test)
    warmup, measured = run.records[:3], run.records[3:]
    assert _outcomes(run) == {"ok": 33}
    assert all(record.is_warmup and record.ended_s < 0.0 for record in warmup)
    assert [record.index for record in measured] == list(range(30))
    assert [record.due_s for record in measured] == [request.due_s for request in workload]
    assert all(0.0 <= record.sent_s - record.due_s < 15.0 for record in measured)
    assert all(record.num_output_tokens == 3 and record.num_cached_tokens == 3 for record in measured)
    assert len(set(fake.peers)) == 3, "two client processes, and the generator's own warm-up"
    prompts = [tuple(request.token_ids.ids) for request in fake.requests]
    assert len(set(prompts)) == 33
    assert all(len(prompt) == 16 and max(prompt) < 900 for prompt in prompts)
    assert run.samples
    assert run.samples[-1].num_waiting_prefill == 5
    info = run.info
    assert (info.kind, info.model, info.seed, info.num_processes, info.command) == ("baton", "fake", 1, 2, "command")
    assert info.workload == "Poisson, 60 requests/s; prompts of 16 tokens, outputs of 3"
    assert not info.was_interrupted
    assert info.duration_s == pytest.approx(max(record.ended_s for record in measured))


async def test_prompts_of_a_trace_share_their_prefixes_on_the_wire() -> None:
    rows = tuple(TraceRow(index * 0.01, 1024, 40, (7, index)) for index in range(4))
    trace = Trace("t", 0, rows)
    async with fake_inference.serving(FakeInference()) as fake:
        workload = Workload(TraceTimes(trace), TraceSizes(trace, length_scale=0.1), seed=1)
        run = await _run(await _load_test(fake, workload, num_processes=2))
    assert _outcomes(run) == {"ok": 4}
    prompts = [tuple(request.token_ids.ids) for request in fake.requests]
    assert {len(prompt) for prompt in prompts} == {102}
    assert len({prompt[:51] for prompt in prompts}) == 1
    assert len({prompt[51:] for prompt in prompts}) == 4
    assert run.info.scaling == ("lengths × 0.1",)


async def test_a_closed_loop_ends_by_the_clock() -> None:
    async with fake_inference.serving(FakeInference(gap_s=0.01)) as fake:
        workload = Workload(ClosedLoop(5), _SIZES, seed=1, duration_s=3.0)
        run = await _run(await _load_test(fake, workload, num_processes=2))
    assert set(_outcomes(run)) == {"ok"}
    assert len(run.records) > 10
    assert all(0.0 <= record.due_s < 3.0 for record in run.records)
    in_flight = [sum(r.sent_s <= at.sent_s < r.ended_s for r in run.records) for at in run.records]
    assert max(in_flight) == 5


async def test_stopping_early_keeps_what_was_measured() -> None:
    stop = asyncio.Event()
    fake = FakeInference(num_before_end=2)
    async with fake_inference.serving(fake), asyncio.TaskGroup() as tasks:
        test = await _load_test(fake, _workload(Arrivals(100.0), 100_000))
        running = tasks.create_task(run_load_test(test, stop, Observed()))
        await fake.stalled.wait()
        stop.set()
        run = await running
    assert run.info.was_interrupted
    assert set(_outcomes(run)) == {"Interrupted"}
    assert max(record.ended_s for record in run.records) < 10.0, "long before the deadline"


async def test_stopping_in_the_warm_up_measures_nothing() -> None:
    stop = asyncio.Event()
    fake = FakeInference(num_before_end=0)
    async with fake_inference.serving(fake), asyncio.TaskGroup() as tasks:
        test = await _load_test(fake, _workload(Arrivals(100.0), 10), num_warmup=2)
        running = tasks.create_task(run_load_test(test, stop, Observed()))
        await fake.stalled.wait()
        stop.set()
        run = await running
    assert run.info.was_interrupted
    assert [(record.outcome, record.is_warmup) for record in run.records] == [("Interrupted", True)] * 2


async def test_a_warm_up_of_which_nothing_came_ends_the_run() -> None:
    observed = Observed()
    async with fake_inference.serving(FakeInference(num_before_end=1, error=ResourceExhausted("full"))) as fake:
        test = await _load_test(fake, _workload(Arrivals(200.0), 10), num_warmup=3)
        with pytest.raises(Unavailable, match="all 3 warm-up requests failed, the last with ResourceExhausted: full"):
            await run_load_test(test, asyncio.Event(), observed)
        assert len(fake.requests) == 3
    assert observed.started_s is None


async def test_refusals_and_stalls_are_outcomes_not_failures_of_the_run() -> None:
    async with fake_inference.serving(FakeInference(num_before_end=1, error=ResourceExhausted("full"))) as fake:
        run = await _run(await _load_test(fake, _workload(Arrivals(200.0), 10)))
        assert _outcomes(run) == {"ResourceExhausted": 10}
        fake.error = None
        run = await _run(await _load_test(fake, _workload(Arrivals(200.0), 10), timeout_s=0.3))
        assert _outcomes(run) == {"DeadlineExceeded": 10}
        assert all(record.ended_s - record.due_s < 15.0 for record in run.records)


async def test_a_server_that_dies_in_the_middle_ends_every_request() -> None:
    fake = FakeInference(num_before_end=2)
    async with fake_inference.serving(fake), asyncio.TaskGroup() as tasks:
        test = await _load_test(fake, _workload(Arrivals(40.0), 20))
        running = tasks.create_task(_run(test))
        await fake.stalled.wait()
        assert fake.server is not None
        await fake.server.stop(0.0)
        run = await running
    assert len(run.records) == 20
    assert set(_outcomes(run)) <= {"ConnectionLost", "Unavailable", "Cancelled"}, (
        "gRPC may still cancel what is in flight"
    )


async def test_an_openai_server() -> None:
    async with fake_openai.serving(FakeOpenAI()) as fake:
        run = await _run(await _load_test(fake, _workload(Arrivals(100.0), 10), num_warmup=1))
    assert _outcomes(run) == {"ok": 11}
    assert all(record.num_output_tokens == 3 and record.num_cached_tokens == 16 for record in run.records)
    assert {len(body["prompt"]) for body in fake.bodies} == {16}


async def test_too_long_a_request_is_refused_before_anything_is_sent() -> None:
    async with fake_inference.serving(FakeInference()) as fake:
        sizes = RandomSizes(Fixed(510), Fixed(3))
        test = await _load_test(fake, Workload(Arrivals(1.0), sizes, seed=1, num_requests=3), num_warmup=1)
        with pytest.raises(InvalidArgument, match="request 0"):
            await _run(test)
    assert not fake.requests


async def test_a_server_that_is_gone_fails_the_run_and_leaves_no_process() -> None:
    before = set(psutil.Process().children())
    target = TargetSpec("baton", "127.0.0.1:9")
    test = LoadTest(target, ModelInfo("fake", 900, 512), _workload(Arrivals(10.0), 5), num_processes=2)
    with pytest.raises(Unavailable):
        await _run(test)
    assert not set(psutil.Process().children()) - before


async def test_a_wrong_worker_address_fails_before_the_run() -> None:
    async with fake_inference.serving(FakeInference()) as fake:
        test = await _load_test(fake, _workload(Arrivals(10.0), 5), worker_addresses=("127.0.0.1:9",))
        with pytest.raises(Unavailable, match=r"worker 127\.0\.0\.1:9"):
            await _run(test)


async def test_a_client_process_that_dies_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'import sys; sys.stdin.readline(); print(\'{"type": "ready"}\', flush=True); sys.exit(3)'
    monkeypatch.setattr(client_group, "_COMMAND", (sys.executable, "-c", script))
    async with fake_inference.serving(FakeInference()) as fake:
        with pytest.raises(InternalError, match="status 3"):
            await _run(await _load_test(fake, _workload(Arrivals(10.0), 5)))


async def test_a_client_process_without_a_generator_stops_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_group, "_END_S", 60.0)
    before = set(psutil.Process().children())
    fake = FakeInference(num_before_end=1)
    async with fake_inference.serving(fake), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(_run(await _load_test(fake, _workload(Arrivals(100.0), 5), timeout_s=600.0)))
        await fake.stalled.wait()
        (client,) = set(psutil.Process().children()) - before
        running.cancel()
        async with asyncio.timeout(30.0):  # the generator would kill it after 60 s
            await asyncio.wait({running})
        assert not client.is_running()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("timeout_s", 0.0, "timeout"),
        ("num_processes", 0, "processes"),
        ("num_processes", 4, "at most 3"),
        ("num_warmup", -1, "warmup"),
    ],
)
def test_options_out_of_bounds_are_refused(field: str, value: float, named: str) -> None:
    options = {field: value}
    with pytest.raises(InvalidArgument, match=named):
        LoadTest(TargetSpec("baton", "x"), ModelInfo("fake", 900, 512), _workload(ClosedLoop(3), 5), **options)  # type: ignore[arg-type]
