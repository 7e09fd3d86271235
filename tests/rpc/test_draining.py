"""A server that stops serves what runs and tells all others UNAVAILABLE: nobody hears CANCELLED."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from typing import Any

import grpc
import pytest
from baton.v1 import worker_pb2, worker_pb2_grpc

from common.errors import Unavailable
from common.rpc import server as rpc_server
from common.rpc.client import open_channel
from common.rpc.connections import close_connections
from common.rpc.server import RpcServer
from common.rpc.status import error_from_rpc

MAX_MESSAGE_BYTES = 1 << 20
NUM_CALLERS = 8


class Streaming(worker_pb2_grpc.WorkerServicer):
    """A stream of two messages, the second of which waits for `release`."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.num_ended = asyncio.Semaphore(0)

    async def GetStatus(  # noqa: N802
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.WorkerStatus:
        await asyncio.sleep(0)
        return worker_pb2.WorkerStatus()

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        try:
            yield worker_pb2.WorkerStatus(worker_id="first")
            await self.release.wait()
            yield worker_pb2.WorkerStatus(worker_id="last")
        finally:
            self.num_ended.release()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:  # noqa: N802
        raise NotImplementedError


class Draining:
    """A server and a channel to it on which a stream runs."""

    def __init__(self, max_connection_age_s: float | None = None) -> None:
        self.servicer = Streaming()
        self.server = RpcServer(
            "127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES, max_connection_age_s=max_connection_age_s
        )
        self.server.add(worker_pb2_grpc.add_WorkerServicer_to_server, self.servicer, "baton.v1.Worker")

    async def __aenter__(self) -> Draining:
        self.port = await self.server.start()
        self.channel = open_channel(f"127.0.0.1:{self.port}", MAX_MESSAGE_BYTES)
        self.stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(self.channel)
        self.stream = self.stub.WatchStatus(worker_pb2.WatchStatusRequest())
        assert await self.stream.read() == worker_pb2.WorkerStatus(worker_id="first")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.stop(0)

    async def call(self) -> grpc.StatusCode:
        """What a new call on the standing channel is told."""
        try:
            await self.stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def keep_calling(self, told: Counter[grpc.StatusCode], stop: asyncio.Event) -> None:
        while not stop.is_set():
            told[await self.call()] += 1


async def test_new_calls_are_told_unavailable_to_the_end_and_what_runs_completes() -> None:
    async with Draining() as draining:
        told: Counter[grpc.StatusCode] = Counter()
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CALLERS):
                tasks.create_task(draining.keep_calling(told, stop))
            while told[grpc.StatusCode.OK] < 10 * NUM_CALLERS:
                await draining.call()
            stopping = tasks.create_task(draining.server.stop(20))
            while told[grpc.StatusCode.UNAVAILABLE] < 10 * NUM_CALLERS:
                await draining.call()
            assert not stopping.done()
            refused = await draining.call()
            draining.servicer.release.set()
            assert await draining.stream.read() == worker_pb2.WorkerStatus(worker_id="last")
            assert await draining.stream.read() is grpc.aio.EOF
            await stopping
            stop.set()
    assert refused is grpc.StatusCode.UNAVAILABLE
    assert set(told) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


async def test_what_runs_longer_than_the_grace_is_told_unavailable() -> None:
    async with Draining() as draining:
        await asyncio.wait_for(draining.server.stop(0.05), 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await draining.stream.read()
    assert isinstance(error_from_rpc(caught.value), Unavailable)
    assert caught.value.details() == "the server stops"


async def test_nobody_can_connect_to_a_server_that_drains() -> None:
    async with Draining() as draining:
        stopping = asyncio.create_task(draining.server.stop(20))
        await asyncio.sleep(0)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", draining.port)
        draining.servicer.release.set()
        await asyncio.wait_for(stopping, 20)


async def test_a_connection_on_which_nothing_runs_is_closed_at_once() -> None:
    async with Draining() as draining:
        idle = open_channel(f"127.0.0.1:{draining.port}", MAX_MESSAGE_BYTES)
        await worker_pb2_grpc.WorkerStub(idle).GetStatus(worker_pb2.GetStatusRequest(), timeout=20)
        stopping = asyncio.create_task(draining.server.stop(20))
        while idle.get_state() is grpc.ChannelConnectivity.READY:
            await asyncio.wait_for(idle.wait_for_state_change(grpc.ChannelConnectivity.READY), 20)
        assert not stopping.done()
        await idle.close()
        draining.servicer.release.set()
        await asyncio.wait_for(stopping, 20)


async def test_clients_of_a_busy_connection_are_served_until_they_were_asked_to_leave() -> None:
    async with Draining(max_connection_age_s=0.2) as draining:
        stopping = asyncio.create_task(draining.server.stop(20))
        # Served on the old connection; then it is to connect anew, which it cannot here.
        told = [await draining.call()]
        while told[-1] is grpc.StatusCode.OK:
            told.append(await draining.call())
        assert len(told) > 1
        assert told[-1] is grpc.StatusCode.UNAVAILABLE
        draining.servicer.release.set()
        assert await draining.stream.read() == worker_pb2.WorkerStatus(worker_id="last")
        await asyncio.wait_for(stopping, 20)


async def test_a_stop_that_was_cancelled_can_be_hurried() -> None:
    async with Draining() as draining:
        stopping = asyncio.create_task(draining.server.stop(3600))
        await asyncio.sleep(0)
        stopping.cancel()
        await asyncio.wait_for(draining.server.stop(0), 20)
        assert await draining.stream.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_that_is_not_read_ends_and_holds_up_no_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.rpc.calls.MAX_STALL_S", 0.05)
    monkeypatch.setattr("common.rpc.calls.STATUS_GRACE_S", 0.05)
    async with Draining() as draining:
        # No window for messages, and none that grows by itself.
        options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{draining.port}", options=options) as deaf:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(deaf)
            unread = stub.WatchStatus(worker_pb2.WatchStatusRequest())
            await asyncio.wait_for(draining.servicer.num_ended.acquire(), 20)
            draining.servicer.release.set()
            await asyncio.wait_for(draining.server.stop(3600), 20)
            unread.cancel()


async def test_who_sends_one_call_after_the_other_is_served_between_two_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.rpc.server.QUIET_S", 0.2)
    async with Draining(max_connection_age_s=3600) as draining:
        draining.servicer.release.set()
        assert await draining.stream.read() == worker_pb2.WorkerStatus(worker_id="last")
        assert await draining.stream.read() is grpc.aio.EOF
        stopping = asyncio.create_task(draining.server.stop(3600))
        for _ in range(20):
            assert await draining.call() is grpc.StatusCode.OK
        assert not stopping.done()
        await asyncio.wait_for(stopping, 20)  # nobody calls any more
        assert await draining.call() is grpc.StatusCode.UNAVAILABLE


class OneByOne(Streaming):
    """Streams end one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = asyncio.Semaphore(0)

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        yield worker_pb2.WorkerStatus(worker_id="first")
        await self.turns.acquire()


async def test_looking_for_connections_takes_little_of_a_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    num_streams, num_looks = 20, 0

    def close_slowly(port: int, except_ports: Collection[int] = ()) -> None:
        nonlocal num_looks
        num_looks += 1
        time.sleep(0.02)  # as with a thousand connections
        close_connections(port, except_ports)

    monkeypatch.setattr(rpc_server, "close_connections", close_slowly)
    servicer = OneByOne()
    server = RpcServer("127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES)
    server.add(worker_pb2_grpc.add_WorkerServicer_to_server, servicer, "baton.v1.Worker")
    channel = open_channel(f"127.0.0.1:{await server.start()}", MAX_MESSAGE_BYTES)
    stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
    streams = [stub.WatchStatus(worker_pb2.WatchStatusRequest()) for _ in range(num_streams)]
    for stream in streams:
        assert await stream.read() == worker_pb2.WorkerStatus(worker_id="first")
    stopping = asyncio.create_task(server.stop(20))
    ends = [asyncio.ensure_future(stream.read()) for stream in streams]
    for num_ended in range(1, num_streams + 1):
        servicer.turns.release()
        while sum(end.done() for end in ends) < num_ended:
            await asyncio.wait([end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED)
    assert {end.result() for end in ends} == {grpc.aio.EOF}
    await stopping
    await channel.close()
    assert num_looks < num_streams / 2
