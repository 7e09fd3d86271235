"""Workers that are connected and say nothing: they get nothing new, and what they had goes on elsewhere.

Time passes only when a test says so; connections are real.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from baton.v1 import inference_pb2, worker_pb2

from common.awake_clock import TICK_S
from services.router import workers
from services.router.worker_list import Role
from tests.router.cluster import Cluster, Output, running_cluster
from tests.router.fake_workers import FakeDecode, FakePrefill, FakeWorker, letters

NOTICED_AFTER_S = 4.0
HOUR_S = 3600.0


class Time:
    """What the router takes for the time."""

    def __init__(self, cluster: Cluster) -> None:
        self._registry = cluster.router.registry
        self._now_s = HOUR_S * 1e6

    def pass_by(self, seconds: float) -> None:
        """Tick by tick; nobody else runs meanwhile."""
        for _ in range(round(seconds / TICK_S)):
            self._now_s += TICK_S
            self._registry.look(self._now_s)

    def jump(self, seconds: float) -> None:
        """The router was stopped for so long."""
        self._now_s += seconds
        self._registry.look(self._now_s)


@contextlib.asynccontextmanager
async def timed_cluster(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_prefills: int = 1,
    num_decodes: int = 1,
    hears_beats: bool = False,  # when time passes by, answers do not come in time
) -> AsyncIterator[tuple[Cluster, Time]]:
    monkeypatch.setattr(FakeDecode, "hears_beats", hears_beats)
    monkeypatch.setattr(workers, "TICK_S", HOUR_S)  # the router itself never ticks
    async with running_cluster(directory, num_prefills=num_prefills, num_decodes=num_decodes) as cluster:
        yield cluster, Time(cluster)


def request(num_tokens: int = 6) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello")
    made.sampling.max_tokens = num_tokens
    return made


async def promise_statuses(cluster: Cluster, role: Role, worker: FakeWorker) -> None:
    """The worker says that a status follows every second, and says nothing from then on."""
    worker.status.max_interval_ms = 1000
    worker.set_state(worker_pb2.WORKER_STATE_READY)
    known = cluster.router.registry.worker(role, worker.address)
    await cluster.wait_until(lambda: known.status is not None and known.status.max_interval_ms == 1000)


def is_candidate(cluster: Cluster, role: Role, worker: FakeWorker) -> bool:
    return worker.address in {c.address for c in cluster.router.registry.candidates(role)}


def assert_moved(outputs: dict[int, Output], num_moves: int) -> None:
    assert outputs[0].token_ids == letters(0, 6)
    assert outputs[0].last is not None
    assert outputs[0].last.lifetime.num_migrations == num_moves


async def prefill_entered(cluster: Cluster) -> FakePrefill:
    """The prefill worker that has the first call, once one has."""
    entered = [asyncio.ensure_future(prefill.entered.wait()) for prefill in cluster.prefills]
    _, rest = await asyncio.wait(entered, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    for waiting in rest:
        waiting.cancel()
    (victim,) = (prefill for prefill in cluster.prefills if prefill.requests)
    return victim


async def test_a_silent_prefill_worker_loses_what_it_computes_and_is_used_again_when_it_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with timed_cluster(tmp_path, monkeypatch, num_prefills=2) as (cluster, time):
        cluster.script.before_first_token.clear()
        generating = asyncio.ensure_future(cluster.generate(request()))
        victim = await prefill_entered(cluster)
        await promise_statuses(cluster, Role.PREFILL, victim)
        time.pass_by(2.75)
        assert is_candidate(cluster, Role.PREFILL, victim)
        time.pass_by(NOTICED_AFTER_S - 2.75)
        assert not is_candidate(cluster, Role.PREFILL, victim)
        await asyncio.wait_for(victim.cancelled.wait(), 20)
        cluster.script.before_first_token.set()
        assert_moved(await generating, 1)
        await cluster.wait_until(lambda: is_candidate(cluster, Role.PREFILL, victim))
        assert victim.num_watches == 2


async def test_a_silent_prefill_worker_loses_its_calls_also_if_it_is_suspected_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with timed_cluster(tmp_path, monkeypatch, num_prefills=2) as (cluster, time):
        cluster.script.before_first_token.clear()
        generating = asyncio.ensure_future(cluster.generate(request()))
        victim = await prefill_entered(cluster)
        await promise_statuses(cluster, Role.PREFILL, victim)
        victim.is_mute = True
        cluster.router.registry.worker(Role.PREFILL, victim.address).suspect()
        await asyncio.wait_for(victim.watched_anew.wait(), 20)
        time.pass_by(NOTICED_AFTER_S)
        await asyncio.wait_for(victim.cancelled.wait(), 20)
        cluster.script.before_first_token.set()
        assert_moved(await generating, 1)


async def test_a_silent_decode_worker_loses_its_sequences_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with timed_cluster(tmp_path, monkeypatch, num_decodes=2) as (cluster, time):
        cluster.script.before_decode.clear()
        generating = asyncio.ensure_future(cluster.generate(request()))
        victim = await cluster.wait_opened()
        await promise_statuses(cluster, Role.DECODE, victim)
        time.pass_by(NOTICED_AFTER_S)
        assert not is_candidate(cluster, Role.DECODE, victim)
        await victim.wait_idle()
        cluster.script.before_decode.set()
        assert_moved(await generating, 1)


async def test_a_router_that_was_stopped_itself_calls_nobody_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with timed_cluster(tmp_path, monkeypatch) as (cluster, time):
        decode = cluster.decodes[0]
        await promise_statuses(cluster, Role.DECODE, decode)
        for _ in range(5):
            time.jump(HOUR_S)
        assert is_candidate(cluster, Role.DECODE, decode)
        assert_moved(await cluster.generate(request()), 0)


async def test_a_worker_of_before_there_were_signs_of_life_is_never_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with timed_cluster(tmp_path, monkeypatch) as (cluster, time):
        time.pass_by(60.0)
        assert_moved(await cluster.generate(request()), 0)
        assert cluster.decodes[0].num_beats == 0
        assert cluster.prefills[0].num_watches == 1


@pytest.mark.parametrize("hears_beats", [True, False])
async def test_a_wedged_session_is_given_up_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hears_beats: bool
) -> None:
    """One that hears beats is found out by them, whether or not anything is asked of it; another by its Opens."""
    async with timed_cluster(tmp_path, monkeypatch, hears_beats=hears_beats) as (cluster, time):
        decode = cluster.decodes[0]
        decode.is_wedged = True
        if not hears_beats:
            with pytest.raises(grpc.aio.AioRpcError):
                await cluster.generate(request(), timeout_s=0.2)
        time.pass_by(5.5)
        await cluster.wait_until(lambda: not is_candidate(cluster, Role.DECODE, decode))
        decode.is_wedged = False
        await cluster.wait_until(lambda: is_candidate(cluster, Role.DECODE, decode))
        assert len(decode.sessions_begun) == 2
        assert_moved(await cluster.generate(request()), 0)


async def test_a_worker_whose_session_answers_no_beat_is_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with timed_cluster(tmp_path, monkeypatch, hears_beats=True) as (cluster, time):
        decode = cluster.decodes[0]
        decode.is_wedged = True
        decode.break_streams()
        decode.beat_seen.clear()
        await asyncio.wait_for(decode.beat_seen.wait(), 20)  # of the second stream
        assert not is_candidate(cluster, Role.DECODE, decode)
        decode.is_wedged = False
        time.pass_by(NOTICED_AFTER_S)
        await cluster.wait_until(lambda: is_candidate(cluster, Role.DECODE, decode))
        assert len(decode.sessions_begun) == 3
