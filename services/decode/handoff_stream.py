"""One Handoff stream on the decode end: what a prefill worker says, in which order it may, and what it is answered.

    Begin ─▶ claimed ─▶ for each ChunkOffer: a `ChunkReception` ─▶ Finish, and all verified ─▶ Joined

A stream that ends before Joined ends its sequence; what was verified, and is final, stays in the prefix cache, so
another Open finds it. Knows gRPC's messages, but not its calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from baton.v1 import kv_pb2

from common.errors import BatonError, Cancelled, FailedPrecondition, InvalidArgument, TransferError, TransferTimeout
from common.kvcache.grant import MAX_LEGS
from common.kvcache.layout import Leg, plan_legs
from common.telemetry.tracing import Span
from services.decode.chunk_reception import ChunkReception
from services.decode.handoff_context import HandoffContext, HandoffSetup
from services.decode.handoff_coverage import HandoffCoverage
from services.decode.request import DecodeSequence

_log = logging.getLogger(__name__)
WRITE_TIMEOUT_S = 10.0  # messages are small, and the other end only queues them
MAX_UNSENT = 1024  # answers: a few for each chunk under way
Write = Callable[[kv_pb2.HandoffResponse], Awaitable[object]]


class HandoffStream:
    """One Handoff stream. Created when its ticket is claimed."""

    def __init__(self, context: HandoffContext, seq: DecodeSequence, begin: kv_pb2.HandoffBegin, span: Span) -> None:
        setup = context.setup
        self.seq = seq
        self.span = span
        self.reserved = asyncio.Event()
        self.peer_names: Sequence[str] = list(begin.rank_peer_names)
        self.peer_secrets: Sequence[bytes] = list(begin.connection_secrets)
        legs = plan_legs(setup.layout.num_kv_heads, begin.prefill_tp_size, setup.tp_size)
        self.legs: Sequence[Leg] = legs
        self.max_layer_blocks_per_chunk = _max_layer_blocks_per_chunk(setup, legs)
        self._context = context
        self._outgoing: asyncio.Queue[kv_pb2.HandoffResponse | BatonError] = asyncio.Queue(MAX_UNSENT)
        self._chunks: dict[int, asyncio.Task[None]] = {}
        self._coverage = HandoffCoverage(seq.blocks.num_cached_blocks, setup.layout.num_layers)
        self._finish: kv_pb2.HandoffFinish | None = None
        self._joined = False
        self.over = False  # nobody reads answers any more

    async def run(self, requests: AsyncIterator[kv_pb2.HandoffRequest], write: Write) -> None:
        """Accept, then answer until Joined was written. Raises what ends the hand-off."""
        accepted = kv_pb2.HandoffAccepted(
            num_blocks_reused=self.seq.blocks.num_cached_blocks,
            max_layer_blocks_per_chunk=self.max_layer_blocks_per_chunk,
        )
        await _write(write, kv_pb2.HandoffResponse(accepted=accepted))
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                response = await self._outgoing.get()
                if isinstance(response, BatonError):
                    raise response
                await _write(write, response)
                if response.HasField("joined"):
                    return
        finally:
            reader.cancel()
            await asyncio.wait({reader})

    def stop(self) -> None:
        """The stream is over: unless joined, so is its sequence, and what is under way for it."""
        self.over = True
        engine = self._context.engine
        if not self._joined and engine.scheduler.close(self.seq.key, engine.clock()):
            engine.settle()
        for task in self._chunks.values():
            task.cancel()

    def fail(self, error: BatonError) -> None:
        """End the stream with an error."""
        if self._outgoing.full():  # what was to be said before is of no use any more
            self._outgoing.get_nowait()
        self._outgoing.put_nowait(error)

    def send(self, response: kv_pb2.HandoffResponse) -> None:
        """Queue an answer. A prefill worker that reads none of many loses the stream."""
        if self._outgoing.qsize() < MAX_UNSENT - 1:
            self._outgoing.put_nowait(response)
        else:
            self.fail(TransferTimeout(f"prefill leaves {MAX_UNSENT - 1} answers unread"))

    def chunk_verified(self, chunk: kv_pb2.ChunkOffer) -> None:
        """The chunk is in place, and the answer that says so is queued."""
        self._chunks.pop(chunk.chunk_index, None)
        self._context.engine.scheduler.verify(self.seq, self._coverage.place(chunk))
        self._try_join()

    def chunk_rejected(self, chunk: kv_pb2.ChunkOffer, reason: kv_pb2.ChunkRejectReason.ValueType, detail: str) -> None:
        """The chunk may be offered again."""
        self._chunks.pop(chunk.chunk_index, None)
        self._coverage.reject(chunk)
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
        if kind == "chunk_offer":
            self._offer(request.chunk_offer)
        elif kind == "chunk_aborted":
            task = self._chunks.get(request.chunk_aborted.chunk_index)
            if task is not None and not task.cancelling():
                self._context.counters.inc("chunks_aborted")
                task.cancel(request.chunk_aborted.reason)
        elif kind == "finish":
            self._take_finish(request.finish)
        else:
            raise InvalidArgument("message", kind, "expected chunk_offer, chunk_aborted or finish")

    def _offer(self, chunk: kv_pb2.ChunkOffer) -> None:
        num_layers, num_blocks = self._context.setup.layout.num_layers, self.seq.num_handoff_blocks
        if chunk.num_layers < 1 or chunk.first_layer + chunk.num_layers > num_layers:
            raise InvalidArgument("chunk_offer.num_layers", chunk.num_layers, f"the model has {num_layers} layers")
        if not 1 <= chunk.num_blocks * chunk.num_layers <= self.max_layer_blocks_per_chunk:
            limit = f"1 to {self.max_layer_blocks_per_chunk // chunk.num_layers} of {chunk.num_layers} layers"
            raise InvalidArgument("chunk_offer.num_blocks", chunk.num_blocks, limit)
        if chunk.first_block + chunk.num_blocks > num_blocks:
            raise InvalidArgument("chunk_offer.first_block", chunk.first_block, "is beyond the sequence")
        if chunk.num_final_blocks > num_blocks:
            raise InvalidArgument("chunk_offer.num_final_blocks", chunk.num_final_blocks, "is beyond the sequence")
        if chunk.chunk_index in self._chunks or not self._coverage.take(chunk):
            raise FailedPrecondition(f"chunk {chunk.chunk_index} has blocks that are here or on their way")
        num_rejections = self._coverage.num_rejections(chunk)
        if num_rejections > self._context.setup.limits.max_chunk_resends:
            raise TransferError(f"chunk {chunk.chunk_index} was rejected {num_rejections} times already")
        self._context.engine.scheduler.finalize(self.seq, chunk.num_final_blocks)
        self._chunks[chunk.chunk_index] = self._context.spawn(ChunkReception(self._context, self, chunk).run())

    def _take_finish(self, finish: kv_pb2.HandoffFinish) -> None:
        if self._finish is not None:
            raise FailedPrecondition("the hand-off was finished before")
        if finish.num_blocks != self.seq.num_handoff_blocks:
            limit = f"the sequence has {self.seq.num_handoff_blocks}"
            raise InvalidArgument("finish.num_blocks", finish.num_blocks, limit)
        if finish.first_token_id >= self._context.setup.vocab_size:
            raise InvalidArgument("finish.first_token_id", finish.first_token_id, "is not in the vocabulary")
        self._finish = finish
        self._context.engine.scheduler.finalize(self.seq, finish.num_blocks)
        self._try_join()

    def _try_join(self) -> None:
        """Join once everything is computed and in place."""
        engine, seq = self._context.engine, self.seq
        if self._finish is None or self._joined or seq.num_verified < seq.num_handoff_blocks:
            return
        engine.scheduler.join(seq, self._finish.first_token_id, engine.clock())
        self._joined = True
        self.send(kv_pb2.HandoffResponse(joined=kv_pb2.HandoffJoined()))
        engine.settle()


async def _write(write: Write, response: kv_pb2.HandoffResponse) -> None:
    """Raises `TransferTimeout` if the prefill worker does not read; gRPC ends the call with that."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await write(response)
    except TimeoutError as error:
        raise TransferTimeout(f"prefill took no message for {WRITE_TIMEOUT_S:g} s") from error


def _max_layer_blocks_per_chunk(setup: HandoffSetup, legs: list[Leg]) -> int:
    """Blocks times layers of which the legs fit into the slot of every decode rank."""
    if len(legs) > MAX_LEGS:
        raise FailedPrecondition(f"the hand-off would take {len(legs)} legs, at most {MAX_LEGS} are possible")
    sizes = []
    for rank in range(setup.tp_size):
        own = [leg.num_heads for leg in legs if leg.decode_rank == rank]
        sizes.append(setup.layout.max_layer_blocks_per_slot(setup.slot_bytes, sum(own), len(own)))
    if min(sizes) < 1:
        raise FailedPrecondition(f"a staging slot of {setup.slot_bytes} bytes is smaller than one layer of a block")
    return min(sizes)
