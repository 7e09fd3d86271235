"""Ranks and a decode worker that do what a test tells them, on one event loop and without a tensor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

import grpc
from baton.v1 import decode_pb2_grpc, kv_pb2

from common.errors import Preempted
from common.kvcache.layout import KVLayout, plan_legs
from common.worker.rank_group import Operation, RankGroup, _Rank
from common.worker.rank_messages import (
    ConnectDone,
    ConnectPeer,
    FrontKVMessage,
    FrontStepMessage,
    RankKVMessage,
    SendDone,
    SendLeg,
    SlotDrained,
)
from common.worker.step_plan import AddRow, RemoveRow, SampledToken, StepPlan, StepResult

FIRST_TOKEN = 42


class Wire:
    """What arrived at the decode ranks, by tag."""

    def __init__(self) -> None:
        self.tags: set[int] = set()
        self._changed = asyncio.Event()

    def deliver(self, tag: int) -> None:
        self.tags.add(tag)
        self._changed.set()
        self._changed = asyncio.Event()

    async def arrival(self, tags: set[int]) -> None:
        while not tags <= self.tags:
            await self._changed.wait()


@dataclass
class _Owner:
    operations: dict[int, Operation] = field(default_factory=dict)


class FakeRanks(RankGroup):
    """Ranks that compute nothing. With `is_manual` steps are answered by `answer_step`, with `holds_sends` legs by
    `finish_send`, with `holds_connects` connections by `finish_connects`."""

    def __init__(self, wire: Wire, pids: list[int]) -> None:
        super().__init__()
        self.wire = wire
        self.fake_pids = pids
        self.is_manual = False
        self.holds_sends = False
        self.holds_connects = False
        self.connect_error = ""
        self.token = SampledToken(-1, FIRST_TOKEN)
        self.rows: set[int] = set()
        self.plans: list[StepPlan] = []
        self.connects: list[tuple[int, str]] = []
        self.connect_messages: list[ConnectPeer] = []
        self.held_connects: list[tuple[ConnectPeer, Operation]] = []
        self.sends: list[tuple[int, SendLeg]] = []
        self.held: list[tuple[SendLeg, Operation]] = []
        self.on_held: asyncio.Event = asyncio.Event()
        self.on_plan: asyncio.Event = asyncio.Event()
        self._owner = _Owner()

    @property
    def pids(self) -> list[int]:
        return self.fake_pids

    def submit(self, message: FrontStepMessage) -> None:
        if isinstance(message, AddRow):
            assert message.row not in self.rows
            self.rows.add(message.row)
        elif isinstance(message, RemoveRow):
            self.rows.remove(message.row)
        elif isinstance(message, StepPlan):
            self.plans.append(message)
            self.on_plan.set()
            if not self.is_manual:
                self.answer_step()

    def answer_step(self) -> None:
        """The result of the oldest plan that has none."""
        plan = self.plans.pop(0)
        sampled = [
            SampledToken(s.row, self.token.token_id, self.token.logprob, self.token.top_logprobs, self.token.error)
            for s in plan.segments
            if s.sample
        ]
        self._results.put_nowait(StepResult(plan.step_id, sampled, 1000))

    def begin(self, rank: int, message: FrontKVMessage) -> Operation:
        if self.lost_reason is not None:
            return super().begin(rank, message)
        operation = Operation(cast(_Rank, self._owner), message.op_id)
        self._owner.operations[message.op_id] = operation
        if isinstance(message, ConnectPeer):
            self.connects.append((rank, message.address))
            self.connect_messages.append(message)
            self.held_connects.append((message, operation))
            if not self.holds_connects:
                self.finish_connects()
        elif isinstance(message, SendLeg):
            self.sends.append((rank, message))
            self.held.append((message, operation))
            self.on_held.set()
            if not self.holds_sends:
                self.finish_send()
        return operation

    def finish_connects(self) -> None:
        """All connections that are held stand, or have failed."""
        while self.held_connects:
            message, operation = self.held_connects.pop()
            operation.deliver(ConnectDone(message.op_id, "fake:lane", self.connect_error, "by the test"))

    def finish_send(self, error_kind: str = "", is_in_doubt: bool = False) -> tuple[SendLeg, Operation]:
        """The oldest leg that is held arrives, or fails."""
        message, operation = self.held.pop(0)
        operation.deliver(SendDone(message.op_id, 1, 2, not is_in_doubt, error_kind, "by the test"))
        if not error_kind:
            self.wire.deliver(message.tag)
        return message, operation

    def lose(self, reason: str = "rank 0 died") -> None:
        super().lose(reason)
        for operation in self._owner.operations.values():
            operation.lose(reason)

    async def stop(self, grace_s: float) -> None:
        self.lose("the worker is stopping")


def drain(leg: SendLeg, operation: Operation) -> None:
    """The connection behind a leg in doubt is closed."""
    reply: RankKVMessage = SlotDrained(leg.op_id)
    operation.deliver(reply)


@dataclass
class Stage:
    """Where a decode worker stops following the protocol, and how: `die`, `preempt`, or `hang` until the
    stream breaks."""

    name: str = ""
    how: str = "hang"


@dataclass
class FakeDecode(decode_pb2_grpc.DecodeServicer):
    """Grants, and verifies what arrived on the wire. `verdicts` are reject reasons for the first offers, in order."""

    layout: KVLayout
    wire: Wire
    tp_size: int = 1
    num_blocks_reused: int = 0
    max_layer_blocks_per_chunk: int = 0  # 0: three whole blocks
    stage: Stage = field(default_factory=Stage)
    verdicts: list[kv_pb2.ChunkRejectReason.ValueType] = field(default_factory=list)
    change_grant: Callable[[kv_pb2.ChunkGrant], None] = lambda _: None
    grant_timeout_s: float = 30.0
    offers: list[kv_pb2.ChunkOffer] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    begin: kv_pb2.HandoffBegin | None = None
    finish: kv_pb2.HandoffFinish | None = None
    num_streams: int = 0
    rejected: asyncio.Event = field(default_factory=asyncio.Event)
    max_chunks_in_flight: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    stream_over: asyncio.Event = field(default_factory=asyncio.Event)

    def Session(self, request_iterator: object, context: object) -> None:  # type: ignore[override] # noqa: N802
        raise NotImplementedError

    async def Handoff(  # type: ignore[override] # noqa: N802
        self,
        request_iterator: AsyncIterator[kv_pb2.HandoffRequest],
        context: grpc.aio.ServicerContext[kv_pb2.HandoffRequest, kv_pb2.HandoffResponse],
    ) -> None:
        self.num_streams += 1
        self.stream_over.clear()
        stream = _Stream(self, context)
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in request_iterator:
                    await stream.take(request, tasks)
                    if stream.joined:
                        break
        finally:
            self.num_streams -= 1
            self.stream_over.set()


class _Stream:
    """One Handoff call."""

    def __init__(
        self, decode: FakeDecode, context: grpc.aio.ServicerContext[kv_pb2.HandoffRequest, kv_pb2.HandoffResponse]
    ) -> None:
        self._decode = decode
        self._context = context
        self._writing = asyncio.Lock()
        self._aborts: dict[int, asyncio.Event] = {}
        self._missing: set[tuple[int, int]] | None = None  # blocks and layers, once finish has said how many
        self._verified: set[tuple[int, int]] = set()
        self.joined = False

    async def take(self, request: kv_pb2.HandoffRequest, tasks: asyncio.TaskGroup) -> None:
        decode = self._decode
        kind = request.WhichOneof("message")
        if kind == "begin":
            decode.begin = request.begin
            await self._pass("begin")
            accepted = kv_pb2.HandoffAccepted(
                num_blocks_reused=decode.num_blocks_reused,
                max_layer_blocks_per_chunk=decode.max_layer_blocks_per_chunk or 3 * decode.layout.num_layers,
            )
            await self._write(kv_pb2.HandoffResponse(accepted=accepted))
        elif kind == "chunk_offer":
            decode.offers.append(request.chunk_offer)
            self._aborts[request.chunk_offer.chunk_index] = asyncio.Event()
            decode.max_chunks_in_flight = max(decode.max_chunks_in_flight, len(self._aborts))
            tasks.create_task(self._receive(request.chunk_offer))
        elif kind == "chunk_aborted":
            decode.aborted.append(request.chunk_aborted.chunk_index)
            self._aborts[request.chunk_aborted.chunk_index].set()
        else:
            decode.finish = request.finish
            await self._pass("finish")
            blocks = range(decode.num_blocks_reused, request.finish.num_blocks)
            self._missing = {(block, layer) for block in blocks for layer in range(decode.layout.num_layers)}
            await self._join()

    async def _join(self) -> None:
        if self._missing is not None and self._missing <= self._verified:
            self.joined = True
            await self._pass("joined")
            await self._write(kv_pb2.HandoffResponse(joined=kv_pb2.HandoffJoined()))

    async def _receive(self, chunk: kv_pb2.ChunkOffer) -> None:
        decode = self._decode
        await self._pass("offered")
        grant = self._grant(chunk)
        decode.change_grant(grant)
        await self._write(kv_pb2.HandoffResponse(grant=grant))
        await self._pass("granted")
        tags = {leg.tag for leg in grant.legs}
        arrived = asyncio.create_task(decode.wire.arrival(tags))
        aborted = asyncio.create_task(self._aborts[chunk.chunk_index].wait())
        done, pending = await asyncio.wait({arrived, aborted}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await self._pass("arrived")
        del self._aborts[chunk.chunk_index]
        reason = decode.verdicts.pop(0) if decode.verdicts else kv_pb2.CHUNK_REJECT_REASON_UNSPECIFIED
        if aborted in done:
            reason = kv_pb2.CHUNK_REJECT_REASON_TIMEOUT
        if reason:
            rejected = kv_pb2.ChunkRejected(chunk_index=chunk.chunk_index, reason=reason, detail="by the test")
            await self._write(kv_pb2.HandoffResponse(chunk_rejected=rejected))
            decode.rejected.set()
        else:
            verified = kv_pb2.ChunkVerified(chunk_index=chunk.chunk_index, transfer_ns=10, verify_ns=5)
            await self._write(kv_pb2.HandoffResponse(chunk_verified=verified))
            for block in range(chunk.first_block, chunk.first_block + chunk.num_blocks):
                for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers):
                    assert (block, layer) not in self._verified
                    self._verified.add((block, layer))
            await self._join()

    def _grant(self, chunk: kv_pb2.ChunkOffer) -> kv_pb2.ChunkGrant:
        decode = self._decode
        assert decode.begin is not None
        grant = kv_pb2.ChunkGrant(chunk_index=chunk.chunk_index, timeout_ns=round(decode.grant_timeout_s * 1e9))
        for leg in plan_legs(decode.layout.num_kv_heads, decode.begin.prefill_tp_size, decode.tp_size):
            grant.legs.add(
                prefill_rank=leg.prefill_rank,
                decode_rank=leg.decode_rank,
                first_head=leg.first_head,
                num_heads=leg.num_heads,
                tag=len(decode.offers) << 8 | len(grant.legs),
                num_bytes=decode.layout.leg_bytes(chunk.num_blocks, chunk.num_layers, leg.num_heads),
            )
        return grant

    async def _pass(self, name: str) -> None:
        stage = self._decode.stage
        if stage.name != name:
            return
        self._decode.reached.set()
        if stage.how == "die":
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, "decode died")
        if stage.how == "preempt":
            raise Preempted("blocks went to others")
        await asyncio.get_running_loop().create_future()

    async def _write(self, response: kv_pb2.HandoffResponse) -> None:
        async with self._writing:
            await self._context.write(response)
