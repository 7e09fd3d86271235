"""The prefill end of one sequence's hand-off: offers chunks while they are computed, fills what decode grants.

    offered ──Grant──► granted ──slot──► sending ──ChunkVerified──► done
       ▲                  │ no slot in time  │ leg failed
       │                  └─► ChunkAborted ◄─┘      │
       └──────────── ChunkRejected ◄────────────────┘   offered again with the same index, a few times

A grant is answered exactly once, by ChunkVerified or ChunkRejected; ChunkAborted only hastens that. What cancelling a
hand-off leaves behind, in any state: the stream breaks at once, which releases the decode end; a send that has begun
goes on in `Sends`, which keeps its slot and its blocks until no rank reads them; everything else is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from baton.v1 import kv_pb2

from common import errors
from services.prefill.chunk_shapes import cut_chunks
from services.prefill.decode_peers import HandoffStream
from services.prefill.engine import PrefillEngine, PrefillJob
from services.prefill.handoff_chunk import Answer, Chunk, SendFailed
from services.prefill.handoff_setup import HandoffSetup
from services.prefill.handoff_stats import HandoffStats, Shipment
from services.prefill.legs import ChunkLegs, decode_ranks
from services.prefill.metrics import PrefillMetrics
from services.prefill.sends import Sends

# How long decode may take, after the grant's time, to say what became of a chunk.
ANSWER_GRACE_S = 5.0
# How long it may take to answer the first message, which waits for the router to open the sequence.
ACCEPT_TIMEOUT_S = 10.0

_T = TypeVar("_T")

_ERROR_BY_REASON: dict[int, type[errors.TransferError]] = {
    kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH: errors.DigestMismatch,
    kv_pb2.CHUNK_REJECT_REASON_TRUNCATED: errors.Truncated,
    kv_pb2.CHUNK_REJECT_REASON_TIMEOUT: errors.TransferTimeout,
    kv_pb2.CHUNK_REJECT_REASON_PEER_LOST: errors.PeerLost,
}


class Handoff:
    """One sequence. `run` is the whole life of it; `stats` may be read at any time."""

    def __init__(
        self,
        setup: HandoffSetup,
        engine: PrefillEngine,
        sends: Sends,
        job: PrefillJob,
        ticket: kv_pb2.Ticket,
        stream: HandoffStream,
        metrics: PrefillMetrics,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.stats = HandoffStats()
        self._setup = setup
        self._engine = engine
        self._sends = sends
        self._job = job
        self._ticket = ticket
        self._stream = stream
        self._metrics = metrics
        self._now_ns = now_ns
        self._ranks = decode_ranks(setup.connection_key, ticket.handoff_address, ticket.rank_addresses)
        self._legs = ChunkLegs(setup.layout, setup.tp_size, self._ranks)
        loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[kv_pb2.HandoffAccepted] = loop.create_future()
        self._joined: asyncio.Future[None] = loop.create_future()
        self._connecting: asyncio.Task[None] | None = None
        self._chunks: dict[int, Chunk] = {}

    async def run(self) -> None:
        """Hand off everything and return once decode has joined the sequence, or give up if its first token ends it.

        Raises one error of the tree.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read())
                watching = tasks.create_task(self._job.watch())
                self._connecting = tasks.create_task(self._connect())
                await self._stream.send(kv_pb2.HandoffRequest(begin=self._begin()))
                shipping = tasks.create_task(self._ship_all())
                token = await self._job.first_token()
                if self._job.finish_reason(token):  # nobody will decode: the stream may break
                    for task in (reading, watching, shipping, self._connecting):
                        task.cancel()
                    return
                finish = kv_pb2.HandoffFinish(first_token_id=token.token_id, num_blocks=self._job.num_blocks)
                await self._stream.send(kv_pb2.HandoffRequest(finish=finish))
                await shipping
                await _answered(self._joined, ANSWER_GRACE_S, "join the sequence")
                self.stats.exposed_ns = self._now_ns() - self._job.sampled_ns
                await self._stream.finish()
                reading.cancel()
                watching.cancel()
        except* errors.BatonError as group:
            raise first_error(group) from None

    def _begin(self) -> kv_pb2.HandoffBegin:
        return kv_pb2.HandoffBegin(
            ticket_id=self._ticket.ticket_id,
            prefill_worker_id=self._setup.worker_id,
            prefill_incarnation=self._setup.incarnation,
            prefill_tp_size=self._setup.tp_size,
            layout_fingerprint=self._setup.layout_fingerprint,
            rank_peer_names=self._setup.rank_peer_names,
            connection_secrets=[rank.secret for rank in self._ranks],
        )

    async def _read(self) -> None:
        while not self._joined.done():
            response = await self._stream.receive()
            kind = response.WhichOneof("message")
            if kind == "accepted" and not self._accepted.done():
                self._accepted.set_result(response.accepted)
            elif kind == "joined":
                _resolve(self._joined, None)
            elif kind in ("grant", "chunk_verified", "chunk_rejected"):
                answer: Answer = getattr(response, kind)
                chunk = self._chunks.get(answer.chunk_index)
                if chunk is not None:  # else: about an attempt that ended otherwise
                    chunk.answer(answer)
            else:
                raise errors.TransferError(f"decode sent an unexpected {kind}")

    async def _connect(self) -> None:
        """Connect every rank to the decode ranks that it has legs to; notes the lanes."""
        timeout_s = self._setup.connect_timeout_s
        connects = (self._sends.connect(rank, peer, timeout_s) for rank, peer in self._legs.connections)
        self.stats.transport = ",".join(sorted(set(await asyncio.gather(*connects))))

    async def _ship_all(self) -> None:
        accepted = await _answered(self._accepted, ACCEPT_TIMEOUT_S, "accept the hand-off")
        most = min(accepted.max_layer_blocks_per_chunk, self._legs.max_layer_blocks(self._setup.slot_bytes))
        if most < 1:
            raise errors.FailedPrecondition("a staging slot is smaller than one layer of a block")
        last = self._setup.last_chunk_bytes // self._legs.layer_block_bytes
        if accepted.num_blocks_reused > self._job.num_blocks:
            raise errors.TransferError(f"decode holds {accepted.num_blocks_reused} of {self._job.num_blocks} blocks")
        self.stats.num_blocks_reused = accepted.num_blocks_reused
        in_flight = asyncio.Semaphore(self._setup.max_chunks_in_flight)
        assert self._connecting is not None
        await asyncio.shield(self._connecting)  # an offer takes a slot at decode, which others could use meanwhile
        first_block = accepted.num_blocks_reused
        async with asyncio.TaskGroup() as tasks:
            while first_block < self._job.num_blocks:
                blocks = await self._job.sendable_blocks(first_block)
                num_layers = self._setup.layout.num_layers
                for shape in cut_chunks(first_block, blocks.end_block, num_layers, last, most):
                    await in_flight.acquire()
                    chunk = Chunk(len(self._chunks), shape, blocks.step_id)
                    self._chunks[chunk.index] = chunk
                    tasks.create_task(self._ship(chunk, in_flight))
                first_block = blocks.end_block

    async def _ship(self, chunk: Chunk, in_flight: asyncio.Semaphore) -> None:
        """Bring one chunk over, offering it again after failures that may pass."""
        while (error := await self._attempt(chunk)) is not None:
            if chunk.attempt >= self._setup.max_chunk_resends:
                raise error
            chunk.attempt += 1
            self.stats.num_chunks_resent += 1
            await self._connect()  # whichever end failed may have closed the connection
            await self._job.ready(chunk.shape.end_block)  # a grant may have run out while a slow step computed
        if chunk.shape.num_stored_layers == self._setup.layout.num_layers:
            self.stats.num_blocks_shipped += chunk.shape.num_blocks
        in_flight.release()

    async def _attempt(self, chunk: Chunk) -> errors.BatonError | None:
        """Offer the chunk once, fill the grant, and wait for the verdict. None: decode has it."""
        offer = chunk.offer(num_final_blocks=self._job.num_ready_blocks)
        offered_ns = self._now_ns()
        self._metrics.num_offered += 1
        try:
            await self._stream.send(kv_pb2.HandoffRequest(chunk_offer=offer))
            answer = await self._answer(chunk)
        finally:
            self._metrics.num_offered -= 1
        granted_ns, begun_ns, num_bytes = 0, 0, 0
        self.stats.grant_ns += self._now_ns() - offered_ns
        if isinstance(answer, kv_pb2.ChunkGrant):
            granted_ns = begun_ns = self._now_ns()
            num_bytes = sum(leg.num_bytes for leg in answer.legs)
            self._metrics.granted(granted_ns - offered_ns)
            deadline_s = asyncio.get_running_loop().time() + answer.timeout_ns / 1e9
            begun = await self._fill(chunk, answer, deadline_s)
            answer = await self._verdict(chunk, deadline_s)
            if isinstance(answer, kv_pb2.ChunkVerified) and begun is not None:
                begun_ns = max(granted_ns, await begun)  # our ranks may say later than decode that it was sent
        ended_ns = self._now_ns()
        is_verified = isinstance(answer, kv_pb2.ChunkVerified)
        self.stats.shipments.append(
            Shipment(chunk.index, chunk.shape, offered_ns, granted_ns, begun_ns, ended_ns, num_bytes, is_verified)
        )
        if isinstance(answer, kv_pb2.ChunkRejected):
            self._metrics.rejected(answer.reason)
            return _ERROR_BY_REASON.get(answer.reason, errors.TransferError)(answer.detail)
        if not isinstance(answer, kv_pb2.ChunkVerified):
            raise errors.TransferError(f"decode granted chunk {chunk.index} twice")
        transfer_ns = max(1, ended_ns - begun_ns - answer.verify_ns)
        self.stats.transfer_ns += transfer_ns
        self.stats.verify_ns += answer.verify_ns
        self._metrics.verified(num_bytes, transfer_ns, self.stats.transport)
        return None

    async def _answer(self, chunk: Chunk) -> Answer:
        """The next message of decode about the chunk; a failure of our own send is passed on as ChunkAborted."""
        while True:
            answer = await chunk.next()
            if not isinstance(answer, SendFailed):
                return answer
            if answer.attempt == chunk.attempt:
                await self._abort(chunk, str(answer.error))

    async def _verdict(self, chunk: Chunk, deadline_s: float) -> Answer:
        try:
            async with asyncio.timeout_at(deadline_s + ANSWER_GRACE_S):
                return await self._answer(chunk)
        except TimeoutError as error:
            raise errors.TransferTimeout(f"decode did not say what became of chunk {chunk.index}") from error

    async def _fill(self, chunk: Chunk, grant: kv_pb2.ChunkGrant, deadline_s: float) -> asyncio.Future[int] | None:
        """Take a slot and start the send; returns when that will have begun to gather, known once it is over.

        If no slot is free in time, gives the grant back.
        """
        legs = self._legs.pack(chunk.shape.num_blocks, chunk.shape.num_layers, grant.legs)
        try:
            async with asyncio.timeout_at(deadline_s):
                handle = await self._sends.slots.acquire()
        except TimeoutError:
            await self._abort(chunk, "no send slot was free in time")
            return None
        attempt = chunk.attempt
        begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def fail(error: errors.BatonError) -> None:
            _resolve(begun, 0)
            chunk.send_failed(SendFailed(attempt, error))

        num_bytes = sum(leg.num_bytes for leg in legs)
        self.stats.bytes_shipped += num_bytes
        self._metrics.inc("bytes_shipped", num_bytes)
        self._engine.begin_read(self._job)
        self._sends.start(
            handle,
            legs,
            chunk.shape,
            self._job.block_ids(chunk.shape.first_block, chunk.shape.num_blocks),
            chunk.step_id,
            max(0.0, deadline_s - asyncio.get_running_loop().time()),
            on_read_done=lambda: self._engine.end_read(self._job),
            on_sent=lambda send_ns: _resolve(begun, self._now_ns() - send_ns),
            on_failure=fail,
        )
        return begun

    async def _abort(self, chunk: Chunk, reason: str) -> None:
        aborted = kv_pb2.ChunkAborted(chunk_index=chunk.index, reason=reason)
        await self._stream.send(kv_pb2.HandoffRequest(chunk_aborted=aborted))


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    """Unless whoever waited was cancelled, and the future with it."""
    if not future.done():
        future.set_result(value)


async def _answered(answer: asyncio.Future[_T], timeout_s: float, what: str) -> _T:
    """Raises `TransferTimeout`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError as error:
        raise errors.TransferTimeout(f"decode did not {what} within {timeout_s:g} s") from error


def first_error(group: BaseExceptionGroup[errors.BatonError]) -> errors.BatonError:
    """The error that came first; what the others say followed from it."""
    found: Sequence[BaseException] = group.exceptions
    while isinstance(found[0], BaseExceptionGroup):
        found = found[0].exceptions
    assert isinstance(found[0], errors.BatonError)
    return found[0]
