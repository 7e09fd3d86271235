"""One chunk of a hand-off on the prefill end, and what may be said about it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.v1 import kv_pb2

from common import errors
from services.prefill.chunk_shapes import ChunkShape

MAX_UNREAD_ANSWERS = 8  # a grant and a verdict, of one attempt after the other


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
    attempt: int = 0
    _inbox: asyncio.Queue[Answer | SendFailed] = field(default_factory=lambda: asyncio.Queue(2 * MAX_UNREAD_ANSWERS))

    async def next(self) -> Answer | SendFailed:
        """What was heard of it next."""
        return await self._inbox.get()

    def answer(self, answer: Answer) -> None:
        """Decode said something of it. Raises `TransferError` if it says more than anybody asked for."""
        if self._inbox.qsize() >= MAX_UNREAD_ANSWERS:
            raise errors.TransferError(f"decode answers chunk {self.index} again and again")
        self._inbox.put_nowait(answer)

    def send_failed(self, failed: SendFailed) -> None:
        """There is a place for it: one attempt follows the other, and each reads what the last one left."""
        self._inbox.put_nowait(failed)

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
