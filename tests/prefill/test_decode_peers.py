"""Channels to decode workers are shared, bounded, and never closed under a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import grpc
import pytest
from baton.v1 import decode_pb2_grpc, kv_pb2
from grpc.aio import Metadata

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    NotFound,
    PeerLost,
    Preempted,
    TransferError,
    Unavailable,
)
from common.kvcache.layout import KVLayout
from common.rpc.server import RpcServer
from common.rpc.status import DETAILS_METADATA_KEY, to_status
from services.prefill.decode_peers import DecodePeers, HandoffStream
from tests.prefill.fakes import FakeDecode, Stage, Wire
from tests.rpc.garbage import GARBAGE, with_garbage

_MAX_BYTES = 1 << 20
BEGIN = kv_pb2.HandoffRequest(begin=kv_pb2.HandoffBegin(prefill_tp_size=1))


@asynccontextmanager
async def decode_worker(decode: FakeDecode) -> AsyncIterator[str]:
    """Its address."""
    server = RpcServer("127.0.0.1:0", max_message_bytes=_MAX_BYTES)
    server.add(with_garbage(decode_pb2_grpc.add_DecodeServicer_to_server), decode, "baton.v1.Decode")
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


async def test_nobody_listening_is_a_lost_peer() -> None:
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(make_decode()) as address:
        pass
    async with peers.open(address) as stream:
        with pytest.raises(PeerLost):
            await stream.receive()
    await peers.close()


async def test_stream_that_just_ends_is_a_lost_peer() -> None:
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(make_decode()) as address, peers.open(address) as stream:
        await stream.send(kv_pb2.HandoffRequest(finish=kv_pb2.HandoffFinish()))
        assert (await stream.receive()).HasField("joined")
        with pytest.raises(PeerLost):
            await stream.receive()
        with pytest.raises(PeerLost):
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
    ("error", "expected"),
    [
        (NotFound("no such ticket"), TransferError),
        (InternalError("bug"), TransferError),
        (InvalidArgument("chunk_offer.num_blocks", 0, "at least one"), TransferError),
        (Unavailable("the ranks are being started"), PeerLost),
    ],
)
async def test_error_of_the_decode_worker_names_it(error: BatonError, expected: type[BatonError]) -> None:
    restored = await refused_with(error)
    assert (type(restored), str(restored)) == (expected, f"the decode worker: {error}")


@pytest.mark.parametrize(
    "error", [Preempted("blocks went to others"), Cancelled("closed"), DeadlineExceeded("late"), TransferError("t")]
)
async def test_what_is_no_fault_of_the_decode_worker_keeps_its_class(error: BatonError) -> None:
    restored = await refused_with(error)
    assert (type(restored), str(restored)) == (type(error), str(error))


async def test_stream_that_grpc_breaks_is_a_lost_peer() -> None:
    assert type(await refused_with(None)) is PeerLost


class _Garbled(FakeDecode):
    """Answers with what is no message."""

    async def Handoff(  # type: ignore[override] # noqa: N802
        self, request_iterator: object, context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        await context.write(GARBAGE)
        await asyncio.Event().wait()


async def test_an_answer_that_is_no_message_ends_the_hand_off_typed() -> None:
    garbled = _Garbled(make_decode().layout, Wire())
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(garbled) as address, peers.open(address) as stream:
        with pytest.raises(TransferError, match="decoded"):
            await stream.receive()
    await peers.close()


class _EndedCall:
    """A call of which a write fails before its status has come, which it does while somebody waits for it."""

    def __init__(self, status: grpc.aio.AioRpcError) -> None:
        self._statuses = [
            grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), "Internal error from Core"),
            status,
        ]

    async def write(self, request: object) -> None:
        raise self._statuses[0]

    async def details(self) -> str | None:
        details = self._statuses[0].details()
        if len(self._statuses) > 1:
            self._statuses.pop(0)
        return details

    async def code(self) -> grpc.StatusCode:
        return self._statuses[0].code()

    async def initial_metadata(self) -> Metadata:
        return self._statuses[0].initial_metadata()

    async def trailing_metadata(self) -> Metadata:
        return self._statuses[0].trailing_metadata()


async def test_write_that_fails_says_what_decode_ended_the_stream_with() -> None:
    details = (DETAILS_METADATA_KEY, to_status(Preempted("blocks went to others")).SerializeToString())
    status = grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, Metadata(), Metadata(details), "blocks went to others")
    with pytest.raises(Preempted, match="blocks went to others"):
        await HandoffStream(cast(Any, _EndedCall(status))).send(BEGIN)


async def test_leaving_the_context_breaks_the_stream() -> None:
    decode = make_decode()
    decode.stage = Stage("begin")
    peers = DecodePeers(_MAX_BYTES, max_idle=1)
    async with decode_worker(decode) as address:
        async with peers.open(address) as stream:
            await stream.send(BEGIN)
            await decode.reached.wait()
        async with asyncio.timeout(20):
            await decode.stream_over.wait()
        assert decode.num_streams == 0
    await peers.close()
