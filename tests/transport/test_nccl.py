"""What is particular to `nccl://`: its side channel, its communicators, and peers that do not keep to the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from common.errors import InvalidArgument, PeerLost, TransferTimeout, Unavailable
from common.transport.hello import Hello
from common.transport.nccl import NcclEndpoint, parse_nccl_url
from common.transport.nccl_library import UNIQUE_ID_BYTES
from common.transport.side_channel import Frame, FrameKind, SideChannel
from tests.transport.fake_communicator import FakeNccl
from tests.transport.memory import CPU
from tests.transport.traffic import canary, pattern, until


@pytest.fixture
async def nccl() -> AsyncIterator[FakeNccl]:
    fake = FakeNccl()
    yield fake
    await fake.close()


@pytest.fixture
async def endpoint(nccl: FakeNccl) -> AsyncIterator[NcclEndpoint]:
    one = await NcclEndpoint.open("nccl://127.0.0.1:0", "receiver", CPU, nccl)
    yield one
    await one.close()


async def stranger(endpoint: NcclEndpoint) -> SideChannel:
    """A peer of the test's own making, before its hello."""
    return SideChannel(*await asyncio.open_connection(*parse_nccl_url(endpoint.address)))


async def test_transfers_in_both_directions_are_queued_in_one_order(nccl: FakeNccl, endpoint: NcclEndpoint) -> None:
    sender = await NcclEndpoint.open("nccl://127.0.0.1:0", "sender", CPU, nccl)
    here, there = await sender.connect(endpoint.address, 10.0), await endpoint.wait_for_peer("sender", 10.0)
    receives = [end.post_receive(tag, canary(70_000)) for tag in range(40) for end in (here, there)]
    sends = [end.send(tag, pattern(70_000, tag)) for tag in range(40) for end in (there, here)]
    await asyncio.gather(*sends, *(receive.wait() for receive in receives))  # the fake asserts the order
    assert all(torch.equal(receive.buffer, pattern(70_000, receive.tag)) for receive in receives)
    await sender.close()


async def test_a_peer_that_never_opens_its_communicator_times_out(nccl: FakeNccl, endpoint: NcclEndpoint) -> None:
    accepted: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(TransferTimeout):
        await endpoint.connect(f"nccl://127.0.0.1:{port}", 0.2)
    for writer in accepted:
        writer.close()
    silent.close()


async def test_a_stranger_that_says_something_else_is_shut_out(endpoint: NcclEndpoint) -> None:
    channel = await stranger(endpoint)
    channel.write(b"GET / HTTP/1.1\r\n\r\n" * 64)
    with pytest.raises(PeerLost):
        await asyncio.wait_for(channel.read(1), 20.0)
    assert endpoint.stats().connections == 0
    channel.close()


async def test_those_who_say_no_hello_are_few(endpoint: NcclEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.transport.greetings.MAX_GREETINGS", 2)
    silent = [await stranger(endpoint) for _ in range(3)]
    with pytest.raises(PeerLost):
        await asyncio.wait_for(silent[0].read(1), 5.0)
    for channel in silent:
        channel.close()


async def test_the_time_for_a_hello_is_bounded(endpoint: NcclEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.transport.nccl.HELLO_TIMEOUT_S", 0.05)
    channel = await stranger(endpoint)
    with pytest.raises(PeerLost):
        await asyncio.wait_for(channel.read(1), 5.0)
    channel.close()


@pytest.mark.parametrize(
    "frame",
    [Frame(FrameKind.DROP, 7), Frame(FrameKind.SEND, 0), Frame(FrameKind.RECEIVE, 0), Frame(FrameKind.READY, 3)],
    ids=lambda frame: frame.kind.name,
)
async def test_a_frame_that_makes_no_sense_ends_the_connection(
    nccl: FakeNccl, endpoint: NcclEndpoint, frame: Frame
) -> None:
    channel = await stranger(endpoint)
    unique_id = nccl.unique_id()
    assert len(unique_id) == UNIQUE_ID_BYTES
    channel.write(Hello("odd", 0).encode() + unique_id)
    await nccl.open(unique_id, 1, 10.0)
    connection = await endpoint.wait_for_peer("odd", 10.0)
    buffer = canary(10)
    receive = connection.post_receive(1, buffer)
    channel.send(frame)
    with pytest.raises(PeerLost):
        await receive.wait()
    await until(lambda: endpoint.stats().connections == 0)
    channel.close()


async def test_a_buffer_on_another_device_is_refused(nccl: FakeNccl, endpoint: NcclEndpoint) -> None:
    sender = await NcclEndpoint.open("nccl://127.0.0.1:0", "sender", CPU, nccl)
    connection = await sender.connect(endpoint.address, 10.0)
    elsewhere = torch.empty(10, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="meta"):
        connection.post_receive(1, elsewhere)
    with pytest.raises(ValueError, match="meta"):
        await connection.send(1, elsewhere)
    connection.post_receive(1, canary(10))
    await sender.close()


async def test_a_taken_port_is_unavailable(nccl: FakeNccl, endpoint: NcclEndpoint) -> None:
    with pytest.raises(Unavailable, match="cannot listen"):
        await NcclEndpoint.open(endpoint.address, "second", CPU, nccl)


@pytest.mark.parametrize("url", ["nccl://", "nccl://host", "nccl://h:x", "nccl://h:1/p", "ucx://h:1", "nccl://h:99999"])
def test_a_bad_url_is_an_invalid_argument(url: str) -> None:
    with pytest.raises(InvalidArgument, match="url"):
        parse_nccl_url(url)
