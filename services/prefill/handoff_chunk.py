"""One chunk of a hand-off on the prefill end, and what may be said about it. Plain values."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from baton.v1 import kv_pb2

from common import errors
from services.prefill.chunk_shapes import ChunkShape


@dataclass(frozen=True, slots=True)
class SendFailed:
    """Our own send of the attempt failed."""

    attempt: int
    error: errors.BatonError


Answer = kv_pb2.ChunkGrant | kv_pb2.ChunkVerified | kv_pb2.ChunkRejected


@dataclass(slots=True)
class Chunk:
    """Layers of blocks on their way; the step `step_id` computes them (-1: they are ready)."""

    index: int
    shape: ChunkShape
    step_id: int
    inbox: asyncio.Queue[Answer | SendFailed]
    attempt: int = 0

    def offer(self, num_final_blocks: int) -> kv_pb2.ChunkOffer:
        """The message that offers it. `num_final_blocks`: leading blocks of the sequence that are computed."""
        return kv_pb2.ChunkOffer(
            chunk_index=self.index,
            first_block=self.shape.first_block,
            num_blocks=self.shape.num_blocks,
            first_layer=self.shape.first_layer,
            num_layers=self.shape.num_layers,
            num_final_blocks=num_final_blocks,
        )
