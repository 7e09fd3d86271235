"""Errors cross a real connection in their class, with google.rpc details, and nothing else leaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from baton.v1 import worker_pb2, worker_pb2_grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from common.errors import (
    BatonError,
    DigestMismatch,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from common.rpc.client import open_channel
from common.rpc.health import HealthServicer
from common.rpc.server import RpcServer
from common.rpc.status import error_from_rpc

MAX_MESSAGE_BYTES = 1 << 20


class FailingWorker(worker_pb2_grpc.WorkerServicer):
    """Raises what it is told to, from a unary handler and an async generator."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def GetStatus(  # noqa: N802
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.WorkerStatus:
        if self.error:
            raise self.error
        return worker_pb2.WorkerStatus()

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        yield worker_pb2.WorkerStatus()
        if self.error:
            raise self.error
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:  # noqa: N802
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError


class Served:
    """A server with one `FailingWorker` and a stub to it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.servicer = FailingWorker(error)
        self.server = RpcServer("127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES)
        self.server.add(worker_pb2_grpc.add_WorkerServicer_to_server, self.servicer, "baton.v1.Worker")

    async def __aenter__(self) -> Served:
        self.port = await self.server.start()
        self.channel = open_channel(f"127.0.0.1:{self.port}", MAX_MESSAGE_BYTES)
        self.stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(self.channel)
        return self

    async def server_is_up(self) -> bool:
        """Whether somebody who connects now is served."""
        async with open_channel(f"127.0.0.1:{self.port}", MAX_MESSAGE_BYTES) as channel:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
            return await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=20) == worker_pb2.WorkerStatus()

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.stop(0)


async def open_error(error: BaseException) -> tuple[grpc.aio.AioRpcError, BatonError]:
    async with Served(error) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.GetStatus(worker_pb2.GetStatusRequest())
    return caught.value, error_from_rpc(caught.value)


async def test_invalid_argument_names_field_value_and_limit() -> None:
    rpc_error, restored = await open_error(InvalidArgument("sampling.top_p", 7.5, "above 0, up to 1"))
    assert rpc_error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(rpc_error)
    violation = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(violation)
    assert violation.field_violations[0].field == "sampling.top_p"
    assert "7.5" in violation.field_violations[0].description
    assert "up to 1" in violation.field_violations[0].description
    assert isinstance(restored, InvalidArgument)
    assert (restored.field, restored.value, restored.limit) == ("sampling.top_p", "7.5", "above 0, up to 1")
    assert str(restored) == "sampling.top_p = 7.5: above 0, up to 1"


async def test_resource_exhausted_carries_a_retry_hint() -> None:
    rpc_error, restored = await open_error(ResourceExhausted("queue is full", retry_after_s=2.5))
    retry = error_details_pb2.RetryInfo()
    assert rpc_status.from_call(rpc_error).details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500
    assert isinstance(restored, ResourceExhausted)
    assert restored.retry_after_s == 2.5


@pytest.mark.parametrize("error", [Unavailable("draining"), DigestMismatch("layer 3"), FailedPrecondition("fp")])
async def test_an_error_is_restored_in_its_class(error: BatonError) -> None:
    _, restored = await open_error(error)
    assert type(restored) is type(error)
    assert str(restored) == str(error)


async def test_an_unknown_exception_leaks_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="common.rpc.server"):
        rpc_error, restored = await open_error(RuntimeError("secret detail"))
    assert rpc_error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (rpc_error.details() or "")
    assert isinstance(restored, InternalError)
    assert "secret detail" in caplog.text


async def test_an_error_inside_an_exception_group_is_found() -> None:
    _, restored = await open_error(ExceptionGroup("group", [ExceptionGroup("inner", [Unavailable("gone")])]))
    assert isinstance(restored, Unavailable)


async def test_a_stream_ends_with_the_error_after_its_messages() -> None:
    async with Served(Unavailable("rank died")) as served:
        call = served.stub.WatchStatus(worker_pb2.WatchStatusRequest())
        assert await call.read() == worker_pb2.WorkerStatus()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert isinstance(error_from_rpc(caught.value), Unavailable)


async def test_a_cancelled_stream_closes_its_generator() -> None:
    async with Served() as served:
        call = served.stub.WatchStatus(worker_pb2.WatchStatusRequest())
        await call.read()
        await served.servicer.entered.wait()
        call.cancel()
        await asyncio.wait_for(served.servicer.cancelled.wait(), 20)


async def test_a_cancelled_unary_call_cancels_its_handler(caplog: pytest.LogCaptureFixture) -> None:
    async with Served() as served:
        call = served.stub.Drain(worker_pb2.DrainRequest())
        await served.servicer.entered.wait()
        call.cancel()
        await asyncio.wait_for(served.servicer.cancelled.wait(), 20)
    assert not caplog.records


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with Served() as served:
        port = served.port
    channel = open_channel(f"127.0.0.1:{port}", MAX_MESSAGE_BYTES)
    stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStatus(worker_pb2.GetStatusRequest())
    assert isinstance(error_from_rpc(caught.value), Unavailable)
    await channel.close()


async def test_health_follows_set_serving_for_every_name() -> None:
    async with Served() as served:
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(served.channel)
        for name in ("", "baton.v1.Worker"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        served.server.set_serving(True)
        for name in ("", "baton.v1.Worker"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service="baton.v1.Worker")


async def test_a_watch_that_nobody_reads_delays_neither_health_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = asyncio.Event()
    watch = HealthServicer.Watch

    async def observed(self: HealthServicer, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        writing.set()  # before its first write, which is never over
        await watch(self, request, context)

    monkeypatch.setattr(HealthServicer, "Watch", observed)
    async with Served() as served:
        # No window for messages, and none that grows by itself.
        options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
        deaf = grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=options)
        unread = health_pb2_grpc.HealthStub(deaf).Watch(health_request())
        await asyncio.wait_for(writing.wait(), 20)
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(served.channel)
        read = aiter(health.Watch(health_request()))
        assert (await asyncio.wait_for(anext(read), 20)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for serving in (True, False, True):
            served.server.set_serving(serving)
            expected = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await asyncio.wait_for(anext(read), 20)).status == expected
            assert (await health.Check(health_request(), timeout=20)).status == expected
        await asyncio.wait_for(served.server.stop(3600), 20)
        unread.cancel()
        await deaf.close()


async def test_a_watch_ends_with_the_server_and_does_not_hold_it_up() -> None:
    async with Served() as served:
        served.server.set_serving(True)
        watch = aiter(health_pb2_grpc.HealthStub(served.channel).Watch(health_request()))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(served.server.stop(3600))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        await asyncio.wait_for(stopping, 20)
        served.server.set_serving(True)  # too late to be heard


async def test_watches_of_health_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.rpc.health.MAX_WATCHES", 3)
    async with Served() as served:
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(served.channel)
        watches = [health.Watch(health_request()) for _ in range(3)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Watch(health_request()).read()
        assert isinstance(error_from_rpc(caught.value), ResourceExhausted)
        answer = await health.Check(health_request())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        for watch in watches:
            watch.cancel()


async def test_health_lists_every_name() -> None:
    async with Served() as served:
        served.server.set_serving(True)
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(served.channel)
        listed = await health.List(health_pb2.HealthListRequest())
        states = {name: answer.status for name, answer in listed.statuses.items()}
        assert states == dict.fromkeys(("", "baton.v1.Worker"), health_pb2.HealthCheckResponse.SERVING)


async def test_health_of_a_service_that_is_not_there() -> None:
    async with Served() as served:
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(served.channel)
        unknown = health_pb2.HealthCheckRequest(service="other")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(unknown)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(unknown)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_reflection_lists_every_service() -> None:
    async with Served() as served:
        reflection: reflection_pb2_grpc.ServerReflectionStub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [response async for response in reflection.ServerReflectionInfo(iter([question]))]
    assert {service.name for service in answer.list_services_response.service} == {
        "baton.v1.Worker",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_message_above_the_limit_is_refused() -> None:
    async with Served() as served:
        channel = open_channel(f"127.0.0.1:{served.port}", 4 * MAX_MESSAGE_BYTES)
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/baton.v1.Worker/GetStatus")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(bytes(MAX_MESSAGE_BYTES + 1))
        await channel.close()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_address_in_use_is_named() -> None:
    async with Served() as served:
        second = RpcServer(f"127.0.0.1:{served.port}", max_message_bytes=MAX_MESSAGE_BYTES)
        with pytest.raises(FailedPrecondition, match=str(served.port)):
            await second.start()
        await second.stop(0)
