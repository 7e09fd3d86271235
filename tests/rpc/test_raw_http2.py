"""Bytes that are no gRPC end one call or connection, never the server, nor what runs on it."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from baton.v1 import worker_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import InternalError, InvalidArgument
from common.rpc import grpc_server
from common.rpc.status import error_from_rpc
from tests.rpc.raw_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, call_frames, call_headers, exchange, frame
from tests.rpc.test_server import Served

UNIMPLEMENTED = b"Method not found"
NOT_UTF8 = (b"/\xff\xfe/x", b"\xc3", b"/baton.v1.Worker/GetStatus\x80", b"/\xed\xa0\x80")


@pytest.mark.parametrize("path", [*NOT_UTF8, b"/baton.v1.Worker/Nothing", b"/", b"*"])
async def test_a_path_that_is_no_method_ends_its_call_alone(path: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with Served() as served:
        stream = served.stub.WatchStatus(worker_pb2.WatchStatusRequest())
        await stream.read()
        await served.servicer.entered.wait()
        answer = await exchange(served.port, call_frames(1, path, b""), UNIMPLEMENTED)
        assert UNIMPLEMENTED in answer
        assert await served.stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=1) == worker_pb2.WorkerStatus()
        assert not served.servicer.cancelled.is_set()
        assert await served.server_is_up()
    assert not caplog.records


async def test_many_such_calls_on_one_connection_are_each_answered() -> None:
    async with Served() as served:
        calls = [frame(HEADERS, END_HEADERS | END_STREAM, 2 * i + 1, call_headers(NOT_UTF8[0])) for i in range(50)]
        last = call_frames(2 * len(calls) + 1, b"/grpc.health.v1.Health/Check", b"")
        answer = await exchange(served.port, b"".join(calls) + last, until=b"\x08\x02")  # NOT_SERVING
        assert b"\x08\x02" in answer
        assert await served.server_is_up()


async def test_a_header_that_is_no_utf8_is_no_reason_to_refuse_a_call() -> None:
    async with Served() as served:
        call = call_frames(1, b"/grpc.health.v1.Health/Check", b"", (b"x-name", b"\xff\xfe"))
        assert b"\x08\x02" in await exchange(served.port, call, until=b"\x08\x02")


async def test_a_server_that_ends_by_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # As grpcio's own: it decodes what it should not.
    monkeypatch.delattr(grpc_server._AioServer, "_make_request_call_future")
    monkeypatch.setattr("common.rpc.server.LOOK_EVERY_S", 0.01)
    async with Served() as served:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # grpcio leaves a task unread
        running = asyncio.create_task(served.server.run())
        await exchange(served.port, call_frames(1, NOT_UTF8[0], b""), until=b"CANCELLED")
        with pytest.raises(InternalError, match=f"port {served.port} has ended"):
            await asyncio.wait_for(running, 20)


@pytest.mark.parametrize("method", ["GetStatus", "WatchStatus"])
async def test_bytes_that_cannot_be_decoded_are_the_callers_fault(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with Served() as served:
            for _ in range(3):
                call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
                call = served.channel.unary_stream(f"/baton.v1.Worker/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(b"\x0a\xff\xff").read()
                error = error_from_rpc(caught.value)
                assert isinstance(error, InvalidArgument)
                assert (error.field, error.limit) == ("message", "cannot be decoded")
    (line,) = [record for record in caplog.records if record.name.startswith("common.rpc")]
    assert line.exc_info is None
    assert method in line.getMessage()


async def test_a_call_without_its_message_is_the_callers_fault() -> None:
    async with Served() as served:
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes]
        call = served.channel.stream_unary("/baton.v1.Worker/GetStatus")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(iter(()))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_whose_message_never_comes_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.rpc.calls.REQUEST_TIMEOUT_S", 0.05)
    async with Served() as served:
        half = frame(HEADERS, END_HEADERS, 1, call_headers(b"/baton.v1.Worker/GetStatus")) + frame(DATA, 0, 1, b"\0\0")
        assert b"did not come" in await exchange(served.port, half, until=b"did not come")


async def test_health_is_answered_after_all_of_it() -> None:
    async with Served() as served:
        for path in NOT_UTF8:
            await exchange(served.port, call_frames(1, path, b""), UNIMPLEMENTED)
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(served.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=1)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
