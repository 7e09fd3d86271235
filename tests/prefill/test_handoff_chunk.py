"""What is heard of a chunk, in order, and no more of it than anybody asked for."""

from __future__ import annotations

import pytest
from baton.v1 import kv_pb2

from common.errors import TransferError
from services.prefill.chunk_shapes import ChunkShape
from services.prefill.handoff_chunk import MAX_UNREAD_ANSWERS, Chunk, SendFailed


def make_chunk() -> Chunk:
    return Chunk(3, ChunkShape(first_block=0, num_blocks=1, first_layer=0, num_layers=1), step_id=-1)


async def test_answers_are_read_in_order() -> None:
    chunk = make_chunk()
    grant, failed = kv_pb2.ChunkGrant(chunk_index=3), SendFailed(0, TransferError("lost"))
    chunk.answer(grant)
    chunk.send_failed(failed)
    assert await chunk.next() is grant
    assert await chunk.next() is failed


async def test_a_peer_that_answers_again_and_again_is_at_fault() -> None:
    chunk = make_chunk()
    for _ in range(MAX_UNREAD_ANSWERS):
        chunk.answer(kv_pb2.ChunkVerified(chunk_index=3))
    with pytest.raises(TransferError, match="chunk 3 again and again"):
        chunk.answer(kv_pb2.ChunkVerified(chunk_index=3))
    chunk.send_failed(SendFailed(0, TransferError("lost")))  # ours has its place
