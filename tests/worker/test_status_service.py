"""The Worker service: when watchers hear of changes, and that draining is passed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import pytest
from baton.v1 import worker_pb2, worker_pb2_grpc

from common.errors import ResourceExhausted
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from common.worker.status_service import BEAT_INTERVAL_S, MAX_WATCHERS, SERVICE_NAME, StatusService


class _Worker:
    """Something with a status; time passes only when a test says so."""

    def __init__(self) -> None:
        self.status = worker_pb2.WorkerStatus(worker_id="worker", num_running=1)
        self.drained = False
        self.num_refreshes = 0
        self.num_builds = 0
        self.sleeps: list[float] = []
        self.time_passes = asyncio.Event()
        self.service = StatusService(self._build, self._drain, self._refresh, self._sleep)

    def change(self, num_running: int) -> None:
        self.status.num_running = num_running
        self.service.notify()

    def _build(self) -> worker_pb2.WorkerStatus:
        self.num_builds += 1
        status = worker_pb2.WorkerStatus()
        status.CopyFrom(self.status)
        return status

    def _drain(self) -> None:
        self.drained = True

    async def _refresh(self) -> None:
        self.num_refreshes += 1

    async def _sleep(self, delay_s: float) -> None:
        self.sleeps.append(delay_s)
        await self.time_passes.wait()
        self.time_passes.clear()


async def _next(watch: AsyncIterator[worker_pb2.WorkerStatus]) -> int:
    async with asyncio.timeout(5.0):
        return (await anext(watch)).num_running


async def test_a_watch_starts_with_a_status_and_goes_on_with_changes() -> None:
    worker = _Worker()
    watch = worker.service.watch(0.5)
    assert await _next(watch) == 1
    worker.change(2)
    worker.time_passes.set()
    assert await _next(watch) == 2
    assert worker.sleeps == [0.5]


async def test_changes_within_the_interval_are_one_status() -> None:
    worker = _Worker()
    watch = worker.service.watch(0.5)
    await _next(watch)
    waiting = asyncio.create_task(_next(watch))
    await asyncio.sleep(0)
    worker.change(2)
    worker.change(3)
    await asyncio.sleep(0)
    assert not waiting.done(), "the interval is not over"
    worker.time_passes.set()
    assert await waiting == 3


async def test_a_notification_without_a_change_sends_nothing() -> None:
    worker = _Worker()
    watch = worker.service.watch(0.0)
    await _next(watch)
    worker.time_passes.set()
    waiting = asyncio.create_task(_next(watch))
    worker.service.notify()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    worker.change(2)
    assert await waiting == 2


async def test_a_watcher_hears_every_second_that_the_worker_runs_and_is_told_so() -> None:
    worker = _Worker()
    watch = worker.service.watch(0.0)
    assert (await anext(watch)).max_interval_ms == 0
    running = asyncio.create_task(worker.service.run())
    try:
        for _ in range(3):  # nothing changes
            waiting = asyncio.create_task(_next(watch))
            for _ in range(5):
                await asyncio.sleep(0)
                worker.time_passes.set()
            assert await waiting == 1
        assert BEAT_INTERVAL_S <= 1.0
        assert worker.sleeps.count(BEAT_INTERVAL_S) >= 3
        worker.time_passes.set()
        assert (await anext(watch)).max_interval_ms == 1000
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_the_workers_end_ends_the_watch() -> None:
    worker = _Worker()
    watch = worker.service.watch(0.0)
    await _next(watch)
    worker.time_passes.set()
    worker.service.close()
    with pytest.raises(StopAsyncIteration):
        await _next(watch)


async def test_a_change_is_built_once_however_many_watch() -> None:
    worker = _Worker()
    watches = [worker.service.watch(0.0) for _ in range(MAX_WATCHERS)]
    worker.time_passes.set()
    for watch in watches:
        assert await _next(watch) == 1
    num_builds = worker.num_builds
    waiting = [asyncio.ensure_future(anext(watch)) for watch in watches]
    worker.change(2)
    told: list[worker_pb2.WorkerStatus] = []
    async with asyncio.timeout(5.0):
        for task in waiting:
            while not task.done():
                worker.time_passes.set()
                await asyncio.sleep(0)
            told.append(task.result())
    assert {id(status) for status in told} == {id(told[0])}
    assert told[0].num_running == 2
    assert worker.num_builds == num_builds + 1


async def test_watchers_are_bounded_and_make_room_when_they_leave() -> None:
    worker = _Worker()
    watches = [worker.service.watch(0.0) for _ in range(MAX_WATCHERS)]
    for watch in watches:
        await _next(watch)
    with pytest.raises(ResourceExhausted, match=str(MAX_WATCHERS)):
        await _next(worker.service.watch(0.0))
    leaving = watches.pop()
    assert isinstance(leaving, AsyncGenerator)
    await leaving.aclose()
    assert await _next(worker.service.watch(0.0)) == 1


async def test_it_serves_over_grpc() -> None:
    worker = _Worker()
    worker.time_passes.set()
    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
    server.add(worker_pb2_grpc.add_WorkerServicer_to_server, worker.service, SERVICE_NAME)
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", 1 << 20) as channel:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
            assert (await stub.GetStatus(worker_pb2.GetStatusRequest())).worker_id == "worker"
            assert worker.num_refreshes == 1
            call = stub.WatchStatus(worker_pb2.WatchStatusRequest(min_interval_ms=0))
            first = await call.read()
            assert first is not grpc.aio.EOF
            await stub.Drain(worker_pb2.DrainRequest())
            assert worker.drained
            worker.change(9)
            second = await call.read()
            assert isinstance(second, worker_pb2.WorkerStatus)
            assert second.num_running == 9
            assert set(worker.sleeps) == {0.0}
            call.cancel()
    finally:
        await server.stop(0.0)
