"""The Decode service over real gRPC: errors in their classes, and what a connection that breaks leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, sampling_pb2

from common.awake_clock import TICK_S
from common.errors import Cancelled, InvalidArgument, NotFound, Unavailable
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from common.rpc.status import error_from_rpc, error_from_status
from services.decode import server as decode_server
from services.decode.server import SERVICE_NAME, DecodeService
from tests.decode.front import Front, next_post, running_front
from tests.decode.requests import token_of
from tests.rpc.garbage import GARBAGE

TICKET_ID = 77


@dataclass(slots=True)
class Service:
    """A front behind a port, and a client of it."""

    front: Front
    stub: decode_pb2_grpc.DecodeAsyncStub
    channel: grpc.aio.Channel

    async def session(self) -> RouterSession:
        """A router's stream that stands."""
        call = self.stub.Session()
        await call.write(decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id="router")))
        session = RouterSession(call)
        tickets = (await session.read()).tickets
        assert list(tickets.rank_addresses) == ["inproc://0"]
        assert (tickets.decode_worker_id, tickets.ticket_id) == (self.front.worker.config.worker_id, 0)
        return session


@dataclass(slots=True)
class RouterSession:
    """The router's end of a session."""

    call: grpc.aio.StreamStreamCall[decode_pb2.SessionRequest, decode_pb2.SessionResponse]

    async def read(self) -> decode_pb2.SessionResponse:
        response = await self.call.read()
        assert isinstance(response, decode_pb2.SessionResponse)
        return response

    async def open(self, request: decode_pb2.OpenRequest) -> decode_pb2.OpenResponse:
        """Open and wait for the answer. Raises what the sequence was refused for."""
        await self.call.write(decode_pb2.SessionRequest(open=request))
        (answer,) = (await self.read()).opened
        assert answer.sequence_id == request.sequence.sequence_id
        if answer.HasField("error"):
            raise error_from_status(answer.error)
        return answer

    async def close(self, sequence_id: int) -> None:
        request = decode_pb2.CloseRequest(sequence_id=sequence_id)
        await self.call.write(decode_pb2.SessionRequest(close=request))


@contextlib.asynccontextmanager
async def serving(**settings: object) -> AsyncIterator[Service]:
    async with running_front(**settings) as front:  # type: ignore[arg-type]
        server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
        server.add(decode_pb2_grpc.add_DecodeServicer_to_server, DecodeService(front.worker), SERVICE_NAME)
        port = await server.start()
        try:
            async with open_channel(f"127.0.0.1:{port}", 1 << 20) as channel:
                stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(channel)
                yield Service(front, stub, channel)
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
    return decode_pb2.OpenRequest(sequence=sequence, ticket_id=TICKET_ID + sequence_id - 1)


def begin() -> kv_pb2.HandoffRequest:
    message = kv_pb2.HandoffBegin(
        ticket_id=TICKET_ID,
        prefill_tp_size=1,
        layout_fingerprint="layout",
        rank_peer_names=["prefill/0"],
        connection_secrets=[bytes(16)],
    )
    return kv_pb2.HandoffRequest(begin=message)


async def test_a_sequence_from_open_to_its_last_token() -> None:
    async with serving() as service:
        session = await service.session()
        await session.open(open_request())
        call = service.stub.Handoff()
        await call.write(begin())
        await call.read()
        await call.write(kv_pb2.HandoffRequest(chunk_offer=kv_pb2.ChunkOffer(num_blocks=2, num_layers=2)))
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
            (entry,) = (await session.read()).sequences
            tokens.extend(entry.token_ids)
            end = entry.end
        assert end == decode_pb2.SEQUENCE_END_FINISHED
        assert tokens == [token_of(1, index) for index in (1, 2, 3)]
        session.call.cancel()
        await service.front.until_free()


async def test_a_router_whose_connection_breaks_has_nothing_open_any_more() -> None:
    async with serving() as service:
        session = await service.session()
        await session.open(open_request())
        call = service.stub.Handoff()
        await call.write(begin())
        await call.read()
        await call.write(kv_pb2.HandoffRequest(chunk_offer=kv_pb2.ChunkOffer(num_blocks=2, num_layers=2)))
        await call.read()
        session.call.cancel()
        await service.front.until_free()


async def test_a_prefill_worker_whose_connection_breaks_leaves_nothing() -> None:
    async with serving() as service:
        session = await service.session()
        await session.open(open_request())
        call = service.stub.Handoff()
        await call.write(begin())
        await call.read()
        await call.write(kv_pb2.HandoffRequest(chunk_offer=kv_pb2.ChunkOffer(num_blocks=2, num_layers=2)))
        await call.read()
        call.cancel()
        await service.front.until_free()
        await session.close(1)  # of what is gone: no error
        assert await session.open(open_request(sequence_id=2))
        session.call.cancel()


async def test_a_sequence_that_is_closed_leaves_nothing_and_the_session_stands() -> None:
    async with serving() as service:
        session = await service.session()
        await session.open(open_request(sequence_id=1))
        await session.close(1)
        await service.front.until_free()
        assert await session.open(open_request(sequence_id=1))
        session.call.cancel()
        await service.front.until_free()


async def test_a_refused_sequence_is_told_why_and_the_session_stands() -> None:
    async with serving(num_blocks=4) as service:
        session = await service.session()
        with pytest.raises(InvalidArgument) as caught:
            await session.open(open_request(max_tokens=13))
        assert (caught.value.field, caught.value.limit) == (
            "sampling.max_tokens",
            "at most 12: the KV cache holds no more",
        )
        assert await session.open(open_request())
        service.front.worker.drain()
        with pytest.raises(Unavailable, match="draining"):
            await session.open(open_request(sequence_id=2))
        session.call.cancel()
        await service.front.until_free()


async def test_a_prompt_that_is_computed_here_has_no_ticket_and_all_its_tokens_come() -> None:
    async with serving() as service:
        session = await service.session()
        request = open_request()
        request.compute_locally = True
        assert (await session.open(request)).num_blocks_reused == 0
        tokens: list[int] = []
        while len(tokens) < 4:
            (entry,) = (await session.read()).sequences
            assert entry.HasField("local_prefill") == (not tokens)
            tokens.extend(entry.token_ids)
        assert tokens == [token_of(1, index) for index in range(4)]
        session.call.cancel()
        await service.front.until_free()


def beat(number: int) -> decode_pb2.SessionRequest:
    return decode_pb2.SessionRequest(beat=decode_pb2.SessionBeat(number=number))


async def test_a_router_that_falls_silent_loses_its_sequences_and_their_hand_offs_end() -> None:
    """Which is how a prefill worker gets back what it computes for a router that is stopped."""
    async with serving() as service:
        call = service.stub.Session()
        begins = decode_pb2.SessionBegin(session_id="router", beats=True)
        await call.write(decode_pb2.SessionRequest(begin=begins))
        session = RouterSession(call)
        assert (await session.read()).HasField("beat")
        await call.write(beat(1))
        assert (await session.read()).beat == 1
        await session.open(open_request())
        handing_off = service.stub.Handoff()
        await handing_off.write(begin())
        await handing_off.read()
        for tick in range(20):
            service.front.worker.sessions.look(1e9 + tick * TICK_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await handing_off.read()
        assert isinstance(error_from_rpc(caught.value), Cancelled)
        await service.front.until_free()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(call)
        assert isinstance(error_from_rpc(caught.value), Unavailable)


async def test_a_session_that_never_begins_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_server, "REQUEST_TIMEOUT_S", 0.05)
    async with serving() as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(service.stub.Session().read(), 20)
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidArgument)
        assert "begin, which did not come within" in str(error)


async def test_what_a_later_router_may_say_is_no_fault() -> None:
    async with serving() as service:
        session = await service.session()
        await session.call.write(decode_pb2.SessionRequest())
        assert await session.open(open_request())
        session.call.cancel()
        await service.front.until_free()


def raw(service: Service, method: str) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    """A call of which the bytes are the test's."""
    return service.channel.stream_stream(f"/{SERVICE_NAME}/{method}")()


async def test_what_cannot_be_decoded_ends_the_session_that_it_came_on_alone() -> None:
    async with serving() as service:
        other = await service.session()
        await other.open(open_request(sequence_id=1))
        garbled = raw(service, "Session")
        for request in (
            decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id="garbled")),
            decode_pb2.SessionRequest(open=open_request(sequence_id=2)),
        ):
            await garbled.write(request.SerializeToString())
        await service.front.until(lambda: service.front.worker.scheduler.num_open == 2)
        await garbled.write(GARBAGE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(garbled)
        assert isinstance(error_from_rpc(caught.value), InvalidArgument)
        await service.front.until(lambda: service.front.worker.scheduler.num_open == 1)
        await other.open(open_request(sequence_id=3))
        other.call.cancel()
        await service.front.until_free()


async def test_what_cannot_be_decoded_ends_the_hand_off_that_it_came_on_alone() -> None:
    async with serving() as service:
        session = await service.session()
        await session.open(open_request(sequence_id=1))
        await session.open(open_request(sequence_id=2))
        garbled = raw(service, "Handoff")
        await garbled.write(begin().SerializeToString())
        await garbled.read()
        await garbled.write(GARBAGE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(garbled)
        assert isinstance(error_from_rpc(caught.value), InvalidArgument)
        await service.front.until(lambda: service.front.worker.scheduler.num_open == 1)
        session.call.cancel()
        await service.front.until_free()


class Deaf:
    """The context of a call whose other end reads nothing: a write never ends."""

    def __init__(self) -> None:
        self.is_writing = asyncio.Event()

    async def write(self, response: decode_pb2.SessionResponse) -> None:
        self.is_writing.set()
        await asyncio.Event().wait()


async def test_a_session_that_is_over_holds_nothing_although_its_router_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def requests() -> AsyncIterator[decode_pb2.SessionRequest]:
        yield decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id="router"))
        yield decode_pb2.SessionRequest(open=open_request())
        await asyncio.Event().wait()

    monkeypatch.setattr("services.decode.server.WRITE_GRACE_S", 0.01)
    async with running_front() as front:
        context = Deaf()
        session = asyncio.ensure_future(DecodeService(front.worker).Session(requests(), cast(Any, context)))
        await asyncio.wait_for(context.is_writing.wait(), 20)
        await front.until(lambda: front.worker.scheduler.num_open == 1)
        front.worker.end_streams()
        await front.until_free()
        with pytest.raises(Unavailable, match="stopping"):
            await asyncio.wait_for(session, 20)


async def read_to_end(call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [decode_pb2.SessionRequest(close=decode_pb2.CloseRequest(sequence_id=1))],
        [decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin())],
        [decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id="router"))] * 2,
    ],
    ids=["nothing", "no begin", "no name", "begin twice"],
)
async def test_a_session_that_breaks_the_protocol_ends(messages: list[decode_pb2.SessionRequest]) -> None:
    async with serving() as service:
        call = service.stub.Session()
        for message in messages:
            await call.write(message)
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(call)
        assert isinstance(error_from_rpc(caught.value), InvalidArgument)
        await service.front.until_free()


async def test_errors_of_a_hand_off_arrive_in_their_classes() -> None:
    async with serving() as service:
        call = service.stub.Handoff()
        await call.write(begin())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(error_from_rpc(caught.value), NotFound)


@pytest.mark.parametrize("method", ["Session", "Handoff"])
async def test_what_cannot_be_decoded_is_the_callers_fault(method: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as service:
        raw: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        raw = service.channel.stream_stream(f"/{SERVICE_NAME}/{method}")
        call = raw()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not any(record.exc_info for record in caplog.records)
