"""One offer of one chunk on the decode end, from the reservation of blocks to the answer.

    ChunkOffer ─▶ blocks reserved ─▶ slot ─▶ receives posted ─▶ Grant ─▶ arrived ─▶ ChunkVerified
                     └─────────────────┴────────────┴─────────────┴────▶ taken back ─▶ ChunkRejected

It runs as a task of `HandoffContext.run`, not of its stream: cancelling it takes its receives back first, then frees
slot and blocks. Knows its stream as a `ChunkOwner` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from baton.v1 import kv_pb2

from common.errors import (
    BatonError,
    Cancelled,
    InternalError,
    PeerLost,
    TransferError,
    TransferTimeout,
    Truncated,
    Unavailable,
)
from common.kvcache.grant import SlotHandle
from common.kvcache.layout import Leg
from common.telemetry.tracing import Span
from common.worker.rank_group import Operation
from common.worker.staging_slots import StagingSlots
from common.worker.worker_metrics import reject_reason
from services.decode.chunk_transfer import IN_DOUBT, PEER_LOST, ChunkTransfer, TransferTimes
from services.decode.handoff_context import HandoffContext
from services.decode.request import DecodeSequence, SequenceState, blocks_of

_log = logging.getLogger(__name__)

_REASON_BY_ERROR: dict[type[TransferError], kv_pb2.ChunkRejectReason.ValueType] = {
    Truncated: kv_pb2.CHUNK_REJECT_REASON_TRUNCATED,
    TransferTimeout: kv_pb2.CHUNK_REJECT_REASON_TIMEOUT,
    PeerLost: kv_pb2.CHUNK_REJECT_REASON_PEER_LOST,
}


class ChunkOwner(Protocol):
    """The stream, as its chunks see it. `reserved` is set once the sequence has its blocks, `over` once nobody reads
    answers any more."""

    seq: DecodeSequence
    reserved: asyncio.Event
    legs: Sequence[Leg]
    peer_names: Sequence[str]  # by prefill rank
    peer_secrets: Sequence[bytes]  # by decode rank
    over: bool
    span: Span  # of the sender

    def send(self, response: kv_pb2.HandoffResponse) -> None:
        """Queue an answer."""

    def fail(self, error: BatonError) -> None:
        """End the stream with an error."""

    def chunk_verified(self, chunk: kv_pb2.ChunkOffer) -> None:
        """The chunk is in place, and the answer that says so is queued."""

    def chunk_rejected(self, chunk: kv_pb2.ChunkOffer, reason: kv_pb2.ChunkRejectReason.ValueType, detail: str) -> None:
        """The chunk may be offered again."""


class ChunkReception:
    """One offer of one chunk, up to its answer. Cancelling `run` takes everything back and then answers, too."""

    def __init__(self, context: HandoffContext, stream: ChunkOwner, chunk: kv_pb2.ChunkOffer) -> None:
        self._context = context
        self._stream = stream
        self._chunk = chunk
        self._offered_ns = time.monotonic_ns()
        self._connection_lost = False

    async def run(self) -> None:
        """Answers with ChunkVerified or ChunkRejected, or ends the stream. Raises nothing but CancelledError."""
        try:
            await self._receive()
        except asyncio.CancelledError as cancelled:
            reason = str(cancelled.args[0]) if cancelled.args else "cancelled"
            self._reject(kv_pb2.CHUNK_REJECT_REASON_TIMEOUT, reason)
        except TransferError as error:
            self._reject(_reason(error), str(error))
        except BatonError as error:
            self._stream.fail(error)
        except Exception as error:  # a bug must end this hand-off, not those beside it
            _log.exception("chunk %d failed", self._chunk.chunk_index)
            self._stream.fail(InternalError(f"chunk {self._chunk.chunk_index}: {error!r}"))

    async def _receive(self) -> None:
        engine, seq = self._context.engine, self._stream.seq
        reserved = engine.scheduler.reserve(seq)
        engine.settle()
        if not reserved:
            await self._stream.reserved.wait()
        group, slots = self._context.require_ranks()
        engine.on_change()
        handle = await slots.acquire()
        if seq.state is not SequenceState.RECEIVING:  # it ended in this very moment: its blocks are not ours
            slots.release(handle)
            raise Cancelled("the sequence is gone")
        block_ids = blocks_of(seq, self._chunk.first_block, self._chunk.num_blocks)
        setup = self._context.setup
        layers = range(self._chunk.first_layer, self._chunk.first_layer + self._chunk.num_layers)
        transfer = ChunkTransfer(group, setup.layout, handle, block_ids, layers, setup.limits.cancel_timeout_s)
        engine.scheduler.hold(seq)
        try:
            await self._fill(transfer)
        finally:
            # Nothing is answered before all is taken back: until then a rank may write to the blocks, and why we lost
            # the bytes is not known. So a cancel that comes meanwhile changes nothing.
            settling = self._context.spawn(self._settle(transfer, slots, handle))
            while not settling.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({settling})
            settling.result()
            if self._connection_lost:
                raise PeerLost("the transport connection is closed")

    async def _fill(self, transfer: ChunkTransfer) -> None:
        limits = self._context.setup.limits
        try:
            stream = self._stream
            await transfer.post(stream.legs, stream.peer_names, stream.peer_secrets, limits.connect_timeout_s)
        except TransferTimeout as error:
            raise PeerLost(str(error)) from error  # it has to connect, not to try the same again
        grant = kv_pb2.ChunkGrant(
            chunk_index=self._chunk.chunk_index,
            legs=transfer.leg_grants(),
            timeout_ns=round(limits.grant_timeout_s * 1e9),
        )
        granted_ns = time.monotonic_ns()
        self._context.counters.granted(granted_ns - self._offered_ns)
        self._stream.send(kv_pb2.HandoffResponse(grant=grant))
        times = await transfer.arrive(limits.grant_timeout_s)
        self._context.counters.verified(transfer.num_bytes, times.transfer_ns, times.verify_ns)
        self._trace(granted_ns, times)
        verified = kv_pb2.ChunkVerified(
            chunk_index=self._chunk.chunk_index, transfer_ns=times.transfer_ns, verify_ns=times.verify_ns
        )
        self._stream.send(kv_pb2.HandoffResponse(chunk_verified=verified))
        self._stream.chunk_verified(self._chunk)

    def _trace(self, granted_ns: int, times: TransferTimes) -> None:
        span, now_ns, index = self._stream.span, time.monotonic_ns(), self._chunk.chunk_index
        arrived_ns = max(granted_ns, now_ns - times.verify_ns)
        span.child("receive", granted_ns, arrived_ns, chunk=index, num_blocks=self._chunk.num_blocks)
        span.child("verify", arrived_ns, now_ns, chunk=index)

    async def _settle(self, transfer: ChunkTransfer, slots: StagingSlots, handle: SlotHandle) -> None:
        """Take back what did not arrive; then slot and blocks are free, but for a slot in doubt."""
        engine, counters = self._context.engine, self._context.counters
        try:
            outcomes, doubtful = await transfer.take_back()
        except Unavailable:
            outcomes, doubtful = [], {}  # the ranks are gone: so are slots and blocks
        engine.scheduler.release_hold(self._stream.seq)
        for outcome in outcomes:
            counters.inc(f"cancelled_legs_{outcome}")
        if doubtful:
            counters.inc("slots_quarantined")
            slots.quarantine(handle, doubtful.keys())
        else:
            slots.release(handle)
        engine.settle()
        for rank, operations in doubtful.items():
            self._context.spawn(self._end_quarantine(slots, handle, rank, operations))
        self._connection_lost = IN_DOUBT in outcomes or PEER_LOST in outcomes

    async def _end_quarantine(
        self, slots: StagingSlots, handle: SlotHandle, rank: int, operations: list[Operation]
    ) -> None:
        with contextlib.suppress(Unavailable):  # the ranks are gone, and the slot with them
            await slots.await_drained(handle, rank, operations)
        self._context.engine.on_change()

    def _reject(self, reason: kv_pb2.ChunkRejectReason.ValueType, detail: str) -> None:
        if self._stream.over:
            return
        self._context.counters.inc(f"chunks_rejected_{reject_reason(reason)}")
        self._stream.chunk_rejected(self._chunk, reason, detail)


def _reason(error: TransferError) -> kv_pb2.ChunkRejectReason.ValueType:
    return _REASON_BY_ERROR.get(type(error), kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH)
