"""Control frames over a TCP connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from common.errors import FailedPrecondition, PeerLost
from common.transport.side_channel import Frame, FrameKind, SideChannel

Channels = tuple[SideChannel, SideChannel]


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    accepted: asyncio.Future[SideChannel] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *pipe: accepted.set_result(SideChannel(*pipe)), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    here, there = SideChannel(*await asyncio.open_connection("127.0.0.1", port)), await accepted
    yield here, there
    here.close()
    there.close()
    server.close()


async def test_frames_arrive_whole_and_in_order(channels: Channels) -> None:
    here, there = channels
    frames = [Frame(kind, number, (1 << 64) - 1 - number, number << 32) for number, kind in enumerate(FrameKind)]
    for frame in frames:
        here.send(frame)
    assert [await there.receive() for _ in frames] == frames


async def test_the_end_of_the_stream_is_a_lost_peer(channels: Channels) -> None:
    here, there = channels
    here.write(b"\1")
    here.close()
    with pytest.raises(PeerLost):
        await there.receive()


async def test_a_frame_of_another_protocol_is_refused(channels: Channels) -> None:
    here, there = channels
    here.write(b"\xff" * 25)
    with pytest.raises(FailedPrecondition, match="kind 255"):
        await there.receive()
