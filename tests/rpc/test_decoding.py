"""What is left of a request's bytes: its known fields, as long as its handler wants them."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import grpc
import pytest
from baton.v1 import inference_pb2

from common.errors import InvalidArgument
from common.rpc.client import open_channel
from common.rpc.decoding import LARGE_BYTES, MAX_FIELDS, SAY_EVERY_S, decoder
from common.rpc.server import RpcServer

METHOD = "/test.Service/Call"
UNKNOWN_TAG = b"\xc2\x3e"  # field 1000, with a length


def unknown_field(num_bytes: int) -> bytes:
    """Fewer than 2 ** 21 bytes of it."""
    length = bytes([num_bytes & 127 | 128, num_bytes >> 7 & 127 | 128, num_bytes >> 14])
    return UNKNOWN_TAG + length + bytes(num_bytes)


@pytest.mark.parametrize("num_bytes", [LARGE_BYTES, 2_000_000])
def test_what_no_field_names_is_not_kept(num_bytes: int) -> None:
    decode = decoder(inference_pb2.GenerateRequest.FromString, METHOD)
    assert decode is not None
    known = inference_pb2.GenerateRequest(text="a" * 100, n=2)
    message = decode(unknown_field(num_bytes) + known.SerializeToString())
    assert message == known
    assert message.ByteSize() == known.ByteSize()


def test_a_large_message_that_is_known_is_taken_as_it_is() -> None:
    decode = decoder(inference_pb2.GenerateRequest.FromString, METHOD)
    assert decode is not None
    known = inference_pb2.GenerateRequest(text="a" * LARGE_BYTES)
    assert decode(known.SerializeToString()) == known


@pytest.mark.parametrize("field", ["chat", "stop"])
def test_many_entries_are_refused_before_memory_is_taken_for_them(field: str) -> None:
    decode = decoder(inference_pb2.GenerateRequest.FromString, METHOD)
    assert decode is not None
    request = inference_pb2.GenerateRequest()
    if field == "chat":
        for _ in range(MAX_FIELDS + 1):
            request.chat.messages.add(role="user")
    else:
        request.stop.extend(["a"] * (2 * MAX_FIELDS))
    with pytest.raises(InvalidArgument, match=f"at most {MAX_FIELDS} fields"):
        decode(request.SerializeToString())


def test_packed_numbers_are_no_fields() -> None:
    decode = decoder(inference_pb2.GenerateRequest.FromString, METHOD)
    assert decode is not None
    request = inference_pb2.GenerateRequest()
    request.token_ids.ids.extend([7] * LARGE_BYTES)
    assert decode(request.SerializeToString()) == request


def test_a_line_in_a_while_says_that_messages_cannot_be_decoded(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    decode = decoder(inference_pb2.GenerateRequest.FromString, METHOD, clock=lambda: now_s)
    assert decode is not None
    for now_s in (0.0, 1.0, SAY_EVERY_S - 0.1, SAY_EVERY_S, SAY_EVERY_S + 1.0):  # noqa: B007 - the clock reads it
        with pytest.raises(InvalidArgument):
            decode(b"\xff\xff\xff")
    assert len(caplog.records) == 2
    assert not any(record.exc_info for record in caplog.records)


class Request:
    """Stands for a message, and can be watched."""


async def test_a_handler_that_lets_go_of_its_request_frees_it() -> None:
    seen: list[weakref.ref[Request]] = []

    def parse(raw: bytes) -> Request:
        request = Request()
        seen.append(weakref.ref(request))
        return request

    async def call(request: Request, context: Any) -> bytes:
        assert seen[0]() is request
        del request
        await asyncio.sleep(0)
        return b"gone" if seen[0]() is None else b"held"

    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(call, request_deserializer=parse)
    server.add(lambda _, to: to.add_registered_method_handlers("test.Service", {"Call": handler}), None, "test.Service")
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", 1 << 20) as channel:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            assert await unary(b"message", timeout=20) == b"gone"
    finally:
        await server.stop(0)


async def test_requests_may_have_a_smaller_limit_than_answers() -> None:
    async def call(request: bytes, context: Any) -> bytes:
        return bytes(10_000)

    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20, max_request_bytes=1000)
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(call)
    server.add(lambda _, to: to.add_registered_method_handlers("test.Service", {"Call": handler}), None, "test.Service")
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", 1 << 20) as channel:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            assert len(await unary(bytes(1000), timeout=20)) == 10_000
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(bytes(1001), timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        await server.stop(0)
