"""One Handoff stream on the decode end: what a prefill worker says, in which order it may, and what it is answered.

    Begin ─▶ claimed ─▶ for each ChunkReady: a `ChunkReception` ─▶ Finish ─▶ Joined

A stream that ends before Joined ends its sequence; what was verified stays in the prefix cache, so another Open finds
it. Knows gRPC's messages, but not its calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from baton.v1 import kv_pb2

from common.errors import BatonError, Cancelled, FailedPrecondition, InvalidArgument, TransferError
from common.kvcache.grant import MAX_LEGS
from common.kvcache.layout import Leg, plan_legs
from common.telemetry.tracing import Span
from services.decode.chunk_reception import ChunkReception
from services.decode.handoff_context import HandoffContext, HandoffSetup
from services.decode.request import DecodeSequence

_log = logging.getLogger(__name__)
Write = Callable[[kv_pb2.HandoffResponse], Awaitable[object]]


class HandoffStream:
    """One Handoff stream. Created when its ticket is claimed."""

    def __init__(self, context: HandoffContext, seq: DecodeSequence, begin: kv_pb2.HandoffBegin, span: Span) -> None:
        setup = context.setup
        self.seq = seq
        self.span = span
        self.reserved = asyncio.Event()
        self.peer_names: Sequence[str] = list(begin.rank_peer_names)
        legs = plan_legs(setup.layout.num_kv_heads, begin.prefill_tp_size, setup.tp_size)
        self.legs: Sequence[Leg] = legs
        self.max_blocks_per_chunk = _max_blocks_per_chunk(setup, legs)
        self._context = context
        self._outgoing: asyncio.Queue[kv_pb2.HandoffResponse | BatonError] = asyncio.Queue()
        self._chunks: dict[int, asyncio.Task[None]] = {}
        self._taken: set[int] = set(range(seq.blocks.num_cached_blocks))  # in place, or on their way
        self._num_rejections: Counter[int] = Counter()  # by block: a peer may number its chunks as it likes
        self._joined = False
        self.over = False  # nobody reads answers any more

    async def run(self, requests: AsyncIterator[kv_pb2.HandoffRequest], write: Write) -> None:
        """Accept, then answer until Joined was written. Raises what ends the hand-off."""
        accepted = kv_pb2.HandoffAccepted(
            num_blocks_reused=self.seq.blocks.num_cached_blocks, max_blocks_per_chunk=self.max_blocks_per_chunk
        )
        await write(kv_pb2.HandoffResponse(accepted=accepted))
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                response = await self._outgoing.get()
                if isinstance(response, BatonError):
                    raise response
                await write(response)
                if response.HasField("joined"):
                    return
        finally:
            reader.cancel()
            await asyncio.wait({reader})

    def stop(self) -> None:
        """The stream is over: unless joined, so is its sequence, and what is under way for it."""
        self.over = True
        if not self._joined and self._context.engine.scheduler.close(self.seq.key):
            self._context.engine.settle()
        for task in self._chunks.values():
            task.cancel()

    def fail(self, error: BatonError) -> None:
        """End the stream with an error."""
        self._outgoing.put_nowait(error)

    def send(self, response: kv_pb2.HandoffResponse) -> None:
        """Queue an answer. Bounded by the chunks in flight."""
        self._outgoing.put_nowait(response)

    def chunk_verified(self, chunk: kv_pb2.ChunkReady) -> None:
        """The chunk's blocks are in place."""
        self._chunks.pop(chunk.chunk_index, None)

    def chunk_rejected(self, chunk: kv_pb2.ChunkReady, reason: kv_pb2.ChunkRejectReason.ValueType, detail: str) -> None:
        """The chunk's blocks may be offered again."""
        self._chunks.pop(chunk.chunk_index, None)
        self._taken.difference_update(_block_range(chunk))
        self._num_rejections.update(_block_range(chunk))
        rejected = kv_pb2.ChunkRejected(chunk_index=chunk.chunk_index, reason=reason, detail=detail)
        self.send(kv_pb2.HandoffResponse(chunk_rejected=rejected))

    async def _read(self, requests: AsyncIterator[kv_pb2.HandoffRequest]) -> None:
        try:
            async for request in requests:
                self._take(request)
            if not self._joined:
                self.fail(Cancelled("the hand-off ended before finish"))
        except BatonError as error:
            self.fail(error)
        except Exception as error:  # of gRPC, when the call breaks; or ours, and then this stream alone ends
            _log.debug("a hand-off stream broke", exc_info=True)
            self.fail(Cancelled(f"the hand-off stream broke: {error!r}"))

    def _take(self, request: kv_pb2.HandoffRequest) -> None:
        kind = request.WhichOneof("message")
        if self._joined:
            raise FailedPrecondition("the hand-off is over")
        if kind == "chunk_ready":
            self._offer(request.chunk_ready)
        elif kind == "chunk_aborted":
            task = self._chunks.get(request.chunk_aborted.chunk_index)
            if task is not None and not task.cancelling():
                self._context.counters.inc("chunks_aborted")
                task.cancel(request.chunk_aborted.reason)
        elif kind == "finish":
            self._finish(request.finish)
        else:
            raise InvalidArgument("message", kind, "expected chunk_ready, chunk_aborted or finish")

    def _offer(self, chunk: kv_pb2.ChunkReady) -> None:
        blocks = _block_range(chunk)
        if not 1 <= chunk.num_blocks <= self.max_blocks_per_chunk:
            raise InvalidArgument("chunk_ready.num_blocks", chunk.num_blocks, f"1 to {self.max_blocks_per_chunk}")
        if blocks.stop > self.seq.num_handoff_blocks:
            raise InvalidArgument("chunk_ready.first_block", chunk.first_block, "is beyond the sequence")
        if chunk.chunk_index in self._chunks or not self._taken.isdisjoint(blocks):
            # A block that is in place may be shared by now: nobody writes to it again.
            raise FailedPrecondition(f"chunk {chunk.chunk_index} has blocks that are here or on their way")
        num_rejections = max(self._num_rejections[block] for block in blocks)
        if num_rejections > self._context.setup.limits.max_chunk_resends:
            raise TransferError(f"chunk {chunk.chunk_index} was rejected {num_rejections} times already")
        self._taken.update(blocks)
        self._chunks[chunk.chunk_index] = self._context.spawn(ChunkReception(self._context, self, chunk).run())

    def _finish(self, finish: kv_pb2.HandoffFinish) -> None:
        engine, seq = self._context.engine, self.seq
        if finish.num_blocks != seq.num_handoff_blocks:
            raise InvalidArgument("finish.num_blocks", finish.num_blocks, f"the sequence has {seq.num_handoff_blocks}")
        if finish.first_token_id >= self._context.setup.vocab_size:
            raise InvalidArgument("finish.first_token_id", finish.first_token_id, "is not in the vocabulary")
        engine.scheduler.join(seq, finish.first_token_id, engine.clock())
        self._joined = True
        self.send(kv_pb2.HandoffResponse(joined=kv_pb2.HandoffJoined()))
        engine.settle()


def _max_blocks_per_chunk(setup: HandoffSetup, legs: list[Leg]) -> int:
    """Blocks whose legs fit into the slot of every decode rank."""
    if len(legs) > MAX_LEGS:
        raise FailedPrecondition(f"the hand-off would take {len(legs)} legs, at most {MAX_LEGS} are possible")
    sizes = []
    for rank in range(setup.tp_size):
        own = [leg.num_heads for leg in legs if leg.decode_rank == rank]
        sizes.append(setup.layout.max_blocks_per_slot(setup.slot_bytes, sum(own), len(own)))
    if min(sizes) < 1:
        raise FailedPrecondition(f"a staging slot of {setup.slot_bytes} bytes is smaller than one block")
    return min(sizes)


def _block_range(chunk: kv_pb2.ChunkReady) -> range:
    return range(chunk.first_block, chunk.first_block + chunk.num_blocks)
