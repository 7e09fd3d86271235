"""The decode end of the hand-off: Handoff streams of prefill workers, and what they do to sequences, slots and ranks.

    Begin ─▶ claimed ─▶ for each ChunkReady: blocks reserved ─▶ slot ─▶ posted ─▶ Grant ─▶ verified ─▶ Finish ─▶ Joined

A stream that ends before Joined ends its sequence; what was verified stays in the prefix cache, so another Open finds
it. A chunk runs as a task of `run`, not of its stream: cancelling it takes its receives back first, then frees slot
and blocks. Knows gRPC's messages, but not its calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass

from baton.v1 import kv_pb2

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    PeerLost,
    ResourceExhausted,
    TransferError,
    TransferTimeout,
    Truncated,
    Unavailable,
)
from common.kvcache.grant import MAX_LEGS, SlotHandle
from common.kvcache.layout import KVLayout, Leg, plan_legs
from common.telemetry.counters import Counters
from common.worker.rank_group import Operation, RankGroup
from services.decode.chunk_transfer import IN_DOUBT, PEER_LOST, ChunkTransfer
from services.decode.engine import DecodeEngine
from services.decode.request import BlocksReserved, DecodeSequence, End, SequenceEnded, SequenceState
from services.decode.scheduler import blocks_of
from services.decode.staging import StagingSlots

_log = logging.getLogger(__name__)
Write = Callable[[kv_pb2.HandoffResponse], Awaitable[object]]

_REASON_BY_ERROR: dict[type[TransferError], kv_pb2.ChunkRejectReason.ValueType] = {
    Truncated: kv_pb2.CHUNK_REJECT_REASON_TRUNCATED,
    TransferTimeout: kv_pb2.CHUNK_REJECT_REASON_TIMEOUT,
    PeerLost: kv_pb2.CHUNK_REJECT_REASON_PEER_LOST,
}


@dataclass(frozen=True, slots=True)
class HandoffLimits:
    """Times and bounds of hand-offs. `grant_timeout_s`: for the bytes of one chunk. `connect_timeout_s`: for a prefill
    rank to appear on the transport. `cancel_timeout_s`: after which a receive that cannot be cancelled is in doubt."""

    grant_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0
    cancel_timeout_s: float = 0.5
    max_waiting_chunks: int = 4096
    max_rejections: int = 16  # per stream


@dataclass(frozen=True, slots=True)
class HandoffSetup:
    """What is the same for every hand-off. `vocab_size` bounds the first token."""

    layout: KVLayout
    layout_fingerprint: str
    tp_size: int
    num_slots: int
    slot_bytes: int
    vocab_size: int
    limits: HandoffLimits


class Handoffs:
    """All hand-offs of a worker."""

    def __init__(self, engine: DecodeEngine, setup: HandoffSetup, counters: Counters) -> None:
        self.engine = engine
        self.setup = setup
        self.counters = counters
        self.group: RankGroup | None = None
        self.slots: StagingSlots | None = None
        self._streams: dict[int, HandoffStream] = {}  # by ticket
        self._tasks: asyncio.TaskGroup | None = None
        engine.on_ticket = self._on_ticket

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def on_ready(self, group: RankGroup) -> None:
        """New ranks, new slots."""
        setup = self.setup
        self.group = group
        self.slots = StagingSlots(setup.num_slots, setup.tp_size, setup.limits.max_waiting_chunks)

    def on_lost(self, reason: str) -> None:
        """The slots went with the ranks. Streams end as their sequences do."""
        if self.slots is not None:
            self.slots.close(reason)
        self.group = self.slots = None

    async def run(self) -> None:
        """Parent of everything that outlives a stream, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._tasks = None

    async def serve(self, requests: AsyncIterator[kv_pb2.HandoffRequest], write: Write) -> None:
        """One stream, from Begin to Joined. Raises one error of the tree. Cancelling it ends the sequence; what is
        under way on the ranks is taken back by tasks of `run`."""
        request = await anext(requests, None)
        if request is None or request.WhichOneof("message") != "begin":
            raise InvalidArgument("message", None, "a hand-off starts with begin")
        begin = request.begin
        seq = self._check(begin)
        stream = self._streams[begin.ticket_id] = HandoffStream(self, seq, begin)
        try:
            await stream.run(requests, write)
        finally:
            del self._streams[begin.ticket_id]
            stream.stop()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start what may outlive a stream."""
        if self._tasks is None:
            work.close()
            raise Unavailable("the worker is stopping")
        return self._tasks.create_task(work)

    def _check(self, begin: kv_pb2.HandoffBegin) -> DecodeSequence:
        if self.group is None:
            raise Unavailable("the ranks are being started")
        fingerprint = self.setup.layout_fingerprint
        if begin.layout_fingerprint != fingerprint:
            raise FailedPrecondition(
                f"layout fingerprint {begin.layout_fingerprint} of {begin.prefill_worker_id} differs from {fingerprint}"
            )
        seq = self.engine.scheduler.find_ticket(begin.ticket_id)
        if seq is None:
            raise NotFound("the ticket is not, or no longer, of this worker")
        if begin.ticket_id in self._streams:
            raise FailedPrecondition("another hand-off of this ticket is under way")
        if not 1 <= begin.prefill_tp_size == len(begin.rank_peer_names):
            raise InvalidArgument("begin.rank_peer_names", len(begin.rank_peer_names), "one per prefill rank")
        return seq

    def _on_ticket(self, event: BlocksReserved | SequenceEnded) -> None:
        stream = self._streams.get(event.ticket_id)
        if stream is None:
            return
        if isinstance(event, BlocksReserved):
            stream.reserved.set()
        else:
            stream.fail(_error_of_end(event))


class HandoffStream:
    """One Handoff stream. Created when its ticket is claimed."""

    def __init__(self, handoffs: Handoffs, seq: DecodeSequence, begin: kv_pb2.HandoffBegin) -> None:
        setup = handoffs.setup
        self.seq = seq
        self.reserved = asyncio.Event()
        self.peer_names = list(begin.rank_peer_names)
        self.legs: list[Leg] = plan_legs(setup.layout.num_kv_heads, begin.prefill_tp_size, setup.tp_size)
        self.max_blocks_per_chunk = _max_blocks_per_chunk(setup, self.legs)
        self._handoffs = handoffs
        self._outgoing: asyncio.Queue[kv_pb2.HandoffResponse | BatonError] = asyncio.Queue()
        self._chunks: dict[int, asyncio.Task[None]] = {}
        self._taken: set[int] = set(range(seq.blocks.num_cached_blocks))  # in place, or on their way
        self._num_rejections = 0
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
        if not self._joined and self._handoffs.engine.scheduler.close(self.seq.key):
            self._handoffs.engine.settle()
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
        self._num_rejections += 1
        if self._num_rejections > self._handoffs.setup.limits.max_rejections:
            self.fail(TransferError(f"{self._num_rejections} chunks were rejected, the last one because: {detail}"))
            return
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
                self._handoffs.counters.inc("chunks_aborted")
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
        self._taken.update(blocks)
        self._chunks[chunk.chunk_index] = self._handoffs.spawn(_Chunk(self._handoffs, self, chunk).run())

    def _finish(self, finish: kv_pb2.HandoffFinish) -> None:
        engine, seq = self._handoffs.engine, self.seq
        if finish.num_blocks != seq.num_handoff_blocks:
            raise InvalidArgument("finish.num_blocks", finish.num_blocks, f"the sequence has {seq.num_handoff_blocks}")
        if finish.first_token_id >= self._handoffs.setup.vocab_size:
            raise InvalidArgument("finish.first_token_id", finish.first_token_id, "is not in the vocabulary")
        engine.scheduler.join(seq, finish.first_token_id, engine.clock())
        self._joined = True
        self.send(kv_pb2.HandoffResponse(joined=kv_pb2.HandoffJoined()))
        engine.settle()


class _Chunk:
    """One offer of one chunk, up to its answer. Cancelling `run` takes everything back and then answers, too."""

    def __init__(self, handoffs: Handoffs, stream: HandoffStream, chunk: kv_pb2.ChunkReady) -> None:
        self._handoffs = handoffs
        self._stream = stream
        self._chunk = chunk
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
        engine, seq = self._handoffs.engine, self._stream.seq
        reserved = engine.scheduler.reserve(seq)
        engine.settle()
        if not reserved:
            await self._stream.reserved.wait()
        slots, group = self._handoffs.slots, self._handoffs.group
        if slots is None or group is None:
            raise Unavailable("the ranks are being started")
        engine.on_change()
        handle = await slots.acquire()
        if seq.state is not SequenceState.RECEIVING:  # it ended in this very moment: its blocks are not ours
            slots.release(handle)
            raise Cancelled("the sequence is gone")
        block_ids = blocks_of(seq, self._chunk.first_block, self._chunk.num_blocks)
        setup = self._handoffs.setup
        transfer = ChunkTransfer(group, setup.layout, handle, block_ids, setup.limits.cancel_timeout_s)
        engine.scheduler.hold(seq)
        try:
            await self._fill(transfer)
        finally:
            # A second cancel must not keep the first from being finished: until then a rank may write to the blocks.
            settling = self._handoffs.spawn(self._settle(transfer, slots, handle))
            await asyncio.shield(settling)
            if self._connection_lost:
                raise PeerLost("the transport connection is closed")

    async def _fill(self, transfer: ChunkTransfer) -> None:
        limits = self._handoffs.setup.limits
        try:
            await transfer.post(self._stream.legs, self._stream.peer_names, limits.connect_timeout_s)
        except TransferTimeout as error:
            raise PeerLost(str(error)) from error  # it has to connect, not to try the same again
        grant = kv_pb2.ChunkGrant(
            chunk_index=self._chunk.chunk_index,
            legs=transfer.leg_grants(),
            timeout_ns=round(limits.grant_timeout_s * 1e9),
        )
        self._stream.send(kv_pb2.HandoffResponse(grant=grant))
        times = await transfer.arrive(limits.grant_timeout_s)
        self._handoffs.counters.inc("chunks_verified")
        self._handoffs.engine.scheduler.verify(self._stream.seq, self._chunk.first_block, self._chunk.num_blocks)
        self._stream.chunk_verified(self._chunk)
        verified = kv_pb2.ChunkVerified(
            chunk_index=self._chunk.chunk_index, transfer_ns=times.transfer_ns, verify_ns=times.verify_ns
        )
        self._stream.send(kv_pb2.HandoffResponse(chunk_verified=verified))

    async def _settle(self, transfer: ChunkTransfer, slots: StagingSlots, handle: SlotHandle) -> None:
        """Take back what did not arrive; then slot and blocks are free, but for a slot in doubt."""
        engine, counters = self._handoffs.engine, self._handoffs.counters
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
            self._handoffs.spawn(self._end_quarantine(slots, handle, rank, operations))
        self._connection_lost = IN_DOUBT in outcomes or PEER_LOST in outcomes

    async def _end_quarantine(
        self, slots: StagingSlots, handle: SlotHandle, rank: int, operations: list[Operation]
    ) -> None:
        with contextlib.suppress(Unavailable):  # the ranks are gone, and the slot with them
            await slots.await_drained(handle, rank, operations)
        self._handoffs.engine.on_change()

    def _reject(self, reason: kv_pb2.ChunkRejectReason.ValueType, detail: str) -> None:
        if self._stream.over:
            return
        name = kv_pb2.ChunkRejectReason.Name(reason).removeprefix("CHUNK_REJECT_REASON_").lower()
        self._handoffs.counters.inc(f"chunks_rejected_{name}")
        self._stream.chunk_rejected(self._chunk, reason, detail)


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


def _reason(error: TransferError) -> kv_pb2.ChunkRejectReason.ValueType:
    return _REASON_BY_ERROR.get(type(error), kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH)


def _error_of_end(event: SequenceEnded) -> BatonError:
    if event.end is End.DEADLINE:
        return DeadlineExceeded("the sequence's deadline passed during its hand-off")
    if event.end is End.PREEMPTED:
        return ResourceExhausted("the sequence gave way to others")
    if event.end is End.LOST:
        return Unavailable("the sequence was lost: the ranks died, or its router came with another stream")
    if event.end is End.FAILED:
        return InternalError(event.error)
    return Cancelled("the sequence was closed")
