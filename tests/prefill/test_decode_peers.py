"""Channels to decode workers are shared, bounded, and never closed under a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from baton.v1 import decode_pb2_grpc, kv_pb2

from common.errors import BatonError, InternalError, NotFound, Preempted, Unavailable
from common.kvcache.layout import KVLayout
from common.rpc.server import RpcServer
from services.prefill.decode_peers import DecodePeers
from tests.prefill.fakes import FakeDecode, Stage, Wire

_MAX_BYTES = 1 << 20
BEGIN = kv_pb2.HandoffRequest(begin=kv_pb2.HandoffBegin(prefill_tp_size=1))


@asynccontextmanager
async def decode_worker(decode: FakeDecode) -> AsyncIterator[str]:
    """Its address."""
    server = RpcServer("127.0.0.1:0", max_message_bytes=_MAX_BYTES)
    server.add(decode_pb2_grpc.add_DecodeServicer_to_server, decode, "baton.v1.Decode")
    try:
        yield f"127.0.0.1:{await server.start()}"
    finally:
        await server.stop(0.0)


def make_decode() -> FakeDecode:
    return FakeDecode(KVLayout(1, 1, 4, 4, "float32"), Wire())


async def test_streams_to_one_address_share_a_channel() -> None:
    decode = make_decode()
    peers = DecodePeers(_MAX_BYTES, max_idle=0)
    async with decode_worker(decode) as address:
        async with peers.open(address) as first, peers.open(address) as second:
            for stream in (first, second):
                await stream.send(BEGIN)
                assert (await stream.receive()).HasField("accepted")
            assert peers.num_channels == 1
        assert peers.num_channels == 0
    await peers.close()


async def test_unused_channels_are_kept_up_to_a_limit_and_used_again() -> None:
    peers = DecodePeers(_MAX_BYTES, max_idle=2)
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(decode_worker(make_decode())) for _ in range(3)]
        for address in [*addresses, addresses[0], addresses[2]]:
            async with peers.open(address) as stream:
                await stream.send(BEGIN)
                await stream.receive()
            assert peers.num_channels <= 2
    await peers.close()
    assert peers.num_channels == 0


async def test_nobody_listening_is_unavailable() -> None:
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(make_decode()) as address:
        pass
    async with peers.open(address) as stream:
        with pytest.raises(Unavailable):
            await stream.receive()
    await peers.close()


async def test_stream_that_just_ends_is_unavailable() -> None:
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(make_decode()) as address, peers.open(address) as stream:
        await stream.send(kv_pb2.HandoffRequest(finish=kv_pb2.HandoffFinish()))
        assert (await stream.receive()).HasField("joined")
        with pytest.raises(Unavailable):
            await stream.receive()
        with pytest.raises(Unavailable):
            await stream.send(BEGIN)
    await peers.close()


class _Refusing(FakeDecode):
    """Ends every hand-off with `error`; with None as gRPC does when a connection breaks in the middle of a message."""

    error: BatonError | None = None

    async def Handoff(  # type: ignore[override] # noqa: N802
        self, request_iterator: object, context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        if self.error is None:
            await context.abort(grpc.StatusCode.INTERNAL, "RST_STREAM")
        raise self.error


async def refused_with(error: BatonError | None) -> BatonError:
    """What the hand-off of a prefill worker ends with."""
    refusing = _Refusing(make_decode().layout, Wire())
    refusing.error = error
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(refusing) as address, peers.open(address) as stream:
        with pytest.raises(BatonError) as caught:
            await stream.receive()
    await peers.close()
    return caught.value


@pytest.mark.parametrize(
    "error", [NotFound("no such ticket"), Preempted("blocks went to others"), InternalError("bug")]
)
async def test_error_of_the_decode_worker_keeps_its_class(error: BatonError) -> None:
    restored = await refused_with(error)
    assert (type(restored), str(restored)) == (type(error), str(error))


async def test_stream_that_grpc_breaks_is_unavailable_and_nobodys_fault() -> None:
    assert type(await refused_with(None)) is Unavailable


async def test_leaving_the_context_breaks_the_stream() -> None:
    decode = make_decode()
    decode.stage = Stage("begin")
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(decode) as address:
        async with peers.open(address) as stream:
            await stream.send(BEGIN)
            await decode.reached.wait()
        async with asyncio.timeout(5):
            await decode.stream_over.wait()
        assert decode.num_streams == 0
    await peers.close()
