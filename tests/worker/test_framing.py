"""Frames keep message borders on both kinds of socket, and say when the stream ends."""

import socket

import msgspec
import pytest

from common.worker.framing import MAX_FRAME_BYTES, AsyncFrames, BlockingFrames, encode_frame
from common.worker.step_plan import RemoveRow, Segment, StepPlan, pack_tokens


async def test_messages_survive_the_way_between_asyncio_and_blocking_sockets() -> None:
    left, right = socket.socketpair()
    frames = await AsyncFrames.open(left)
    blocking = BlockingFrames(right)
    plan = StepPlan(3, [Segment(1, pack_tokens([5, 6]), 64, [9], False, 0), Segment(2, None, 70, [], True, 4)])
    frames.send(plan)
    frames.send(RemoveRow(7))
    received = [blocking.receive(), blocking.receive()]
    assert msgspec.msgpack.decode(received[0] or b"", type=StepPlan | RemoveRow) == plan
    assert msgspec.msgpack.decode(received[1] or b"", type=StepPlan | RemoveRow) == RemoveRow(7)
    blocking.send(RemoveRow(8))
    assert msgspec.msgpack.decode(await frames.receive() or b"", type=RemoveRow) == RemoveRow(8)
    await frames.close()
    assert blocking.receive() is None
    right.close()


async def test_end_of_the_stream_inside_a_frame_is_an_end() -> None:
    left, right = socket.socketpair()
    frames = await AsyncFrames.open(left)
    right.sendall(encode_frame(RemoveRow(1))[:-1])
    right.close()
    assert await frames.receive() is None
    await frames.close()


def test_an_end_with_messages_unread_is_an_end() -> None:
    left, right = socket.socketpair()
    with left:
        frames = BlockingFrames(left)
        frames.send(RemoveRow(1))
        right.close()  # resets the connection, as the message is still there
        assert frames.receive() is None


def test_oversized_message_is_refused() -> None:
    with pytest.raises(ValueError, match="frame limit"):
        encode_frame(StepPlan(0, [Segment(0, bytes(MAX_FRAME_BYTES), 0, [], False, 0)]))
