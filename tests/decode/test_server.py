"""The Decode service over real gRPC: errors in their classes, and what a connection that breaks leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, sampling_pb2

from common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from common.rpc.status import error_from_rpc
from services.decode.server import SERVICE_NAME, DecodeService
from tests.decode.front import Front, next_post, running_front
from tests.decode.requests import token_of


@dataclass(slots=True)
class Service:
    """A front behind a port, and a client of it."""

    front: Front
    stub: decode_pb2_grpc.DecodeAsyncStub


@contextlib.asynccontextmanager
async def serving(**settings: object) -> AsyncIterator[Service]:
    async with running_front(**settings) as front:  # type: ignore[arg-type]
        server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
        server.add(decode_pb2_grpc.add_DecodeServicer_to_server, DecodeService(front.worker), SERVICE_NAME)
        port = await server.start()
        try:
            async with open_channel(f"127.0.0.1:{port}", 1 << 20) as channel:
                stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(channel)
                yield Service(front, stub)
        finally:
            await server.stop(0.0)


def open_request(sequence_id: int = 1, **sampling: int) -> decode_pb2.OpenRequest:
    values = {"max_tokens": 4, "seed": 1} | sampling
    sequence = kv_pb2.Sequence(
        request_id="request",
        sequence_id=sequence_id,
        token_ids=[1, 2, 3, 4, 5],
        num_prompt_tokens=5,
        sampling=sampling_pb2.SamplingParams(**values),  # type: ignore[arg-type]
        timeout_ns=60_000_000_000,
    )
    return decode_pb2.OpenRequest(session_id="router", sequence=sequence)


def begin(ticket: kv_pb2.Ticket) -> kv_pb2.HandoffRequest:
    message = kv_pb2.HandoffBegin(
        ticket_id=ticket.ticket_id, prefill_tp_size=1, layout_fingerprint="layout", rank_peer_names=["prefill/0"]
    )
    return kv_pb2.HandoffRequest(begin=message)


async def test_a_sequence_from_open_to_its_last_token() -> None:
    async with serving() as service:
        stream = service.stub.Subscribe(decode_pb2.SubscribeRequest(session_id="router"))
        assert await stream.read() == decode_pb2.TokenBatch()
        ticket = (await service.stub.Open(open_request())).ticket
        assert list(ticket.rank_addresses) == ["inproc://0"]
        call = service.stub.Handoff()
        await call.write(begin(ticket))
        await call.read()
        await call.write(kv_pb2.HandoffRequest(chunk_ready=kv_pb2.ChunkReady(num_blocks=2)))
        await call.read()
        service.front.group.finish((await next_post(service.front))[1])
        await call.read()
        finish = kv_pb2.HandoffFinish(first_token_id=1, num_blocks=2)
        await call.write(kv_pb2.HandoffRequest(finish=finish))
        joined = await call.read()
        assert isinstance(joined, kv_pb2.HandoffResponse)
        assert joined.HasField("joined")
        assert await call.read() is grpc.aio.EOF
        tokens: list[int] = []
        end = decode_pb2.SEQUENCE_END_UNSPECIFIED
        while not end:
            batch = await stream.read()
            assert isinstance(batch, decode_pb2.TokenBatch)
            (entry,) = batch.sequences
            tokens.extend(entry.token_ids)
            end = entry.end
        assert end == decode_pb2.SEQUENCE_END_FINISHED
        assert tokens == [token_of(1, index) for index in (1, 2, 3)]
        stream.cancel()
        await service.front.until_free()


async def test_a_router_whose_connection_breaks_has_nothing_open_any_more() -> None:
    async with serving() as service:
        stream = service.stub.Subscribe(decode_pb2.SubscribeRequest(session_id="router"))
        await stream.read()
        ticket = (await service.stub.Open(open_request())).ticket
        call = service.stub.Handoff()
        await call.write(begin(ticket))
        await call.read()
        await call.write(kv_pb2.HandoffRequest(chunk_ready=kv_pb2.ChunkReady(num_blocks=2)))
        await call.read()
        stream.cancel()
        await service.front.until_free()


async def test_a_prefill_worker_whose_connection_breaks_leaves_nothing() -> None:
    async with serving() as service:
        stream = service.stub.Subscribe(decode_pb2.SubscribeRequest(session_id="router"))
        await stream.read()
        ticket = (await service.stub.Open(open_request())).ticket
        call = service.stub.Handoff()
        await call.write(begin(ticket))
        await call.read()
        await call.write(kv_pb2.HandoffRequest(chunk_ready=kv_pb2.ChunkReady(num_blocks=2)))
        await call.read()
        call.cancel()
        await service.front.until_free()
        assert not (await service.stub.Close(decode_pb2.CloseRequest(session_id="router", sequence_id=1))).was_open
        stream.cancel()


async def test_errors_arrive_in_their_classes() -> None:
    async with serving(num_blocks=4) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Open(open_request())
        assert isinstance(error_from_rpc(caught.value), FailedPrecondition)
        stream = service.stub.Subscribe(decode_pb2.SubscribeRequest(session_id="router"))
        await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Open(open_request(max_tokens=13))
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidArgument)
        assert (error.field, error.limit) == ("sampling.max_tokens", "at most 12: the KV cache holds no more")
        call = service.stub.Handoff()
        await call.write(begin(kv_pb2.Ticket(ticket_id=5)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(error_from_rpc(caught.value), NotFound)
        service.front.worker.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Open(open_request())
        assert isinstance(error_from_rpc(caught.value), Unavailable)
        stream.cancel()
        await service.front.until_free()
