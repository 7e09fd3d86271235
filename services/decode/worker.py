"""The decode worker as a whole: its ranks, scheduler, engine, hand-offs and sessions, and its status. Knows no RPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator

from baton.v1 import kv_pb2, worker_pb2

from common.errors import Unavailable
from common.kvcache.kv_cache_manager import KVCacheManager
from common.telemetry.tracing import NO_SPAN, Span
from common.worker.kv_address import reachable_url
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import GetTransportStats, TransportStatsReply
from common.worker.sequence import SequenceLimits, SequenceRequest
from common.worker.supervisor import RankSupervisor
from common.worker.worker_front import StartGroup, WorkerFront
from common.worker.worker_model import WorkerModel
from services.decode.config import DecodeConfig
from services.decode.engine import DecodeEngine
from services.decode.handoff import Handoffs
from services.decode.handoff_context import HandoffContext, HandoffSetup
from services.decode.handoff_stream import Write
from services.decode.metrics import DecodeMetrics
from services.decode.request import DecodeSequence, End
from services.decode.scheduler import DecodeScheduler
from services.decode.sessions import Session, Sessions

_log = logging.getLogger(__name__)
_REFRESH_TIMEOUT_S = 0.25


class DecodeWorker(WorkerFront[DecodeConfig, DecodeMetrics]):
    """See `WorkerFront`."""

    role = worker_pb2.WORKER_ROLE_DECODE
    rank_module = "services.decode.rank"
    captures_steps = True
    ranks_listen = True

    def __init__(
        self,
        config: DecodeConfig,
        model: WorkerModel,
        on_change: Callable[[], None],
        start_ranks: StartGroup = RankGroup.start,
    ) -> None:
        super().__init__(config, model, DecodeMetrics(), on_change, start_ranks)
        self.advertise = config.advertise or config.listen
        self.captured_chunk_tokens = config.chunk_tokens if config.capture_chunks else 0
        self.scheduler = DecodeScheduler(
            lambda: KVCacheManager(self.num_blocks, config.block_size, config.prefix_cache),
            config.max_rows,
            config.max_open,
            model.digest,
            config.chunk_tokens,
        )
        self.sessions = Sessions(max_pending=4 * config.max_open)
        self.engine = DecodeEngine(self.scheduler, self.sessions, self.counters, config.step_timeout_s)
        self.engine.on_change = on_change
        self.handoff_context = HandoffContext(self.engine, _handoff_setup(config, model), self.counters)
        self.handoffs = Handoffs(self.handoff_context)
        self._limits = SequenceLimits(model.config.vocab_size, model.config.context_length)
        self._group: RankGroup | None = None
        self._transport_totals: dict[int, TransportStatsReply] = {}
        self._is_refreshing = False

    @property
    def max_step_tokens(self) -> int:
        return self.config.max_rows + self.config.chunk_tokens

    @property
    def has_ranks(self) -> bool:
        return self._group is not None

    async def run(self) -> None:
        supervisor = RankSupervisor(
            self.start_group, self.on_ready, self.on_lost, hang_timeout_s=self.config.step_timeout_s
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.handoff_context.run())
                tasks.create_task(self.engine.run())
                tasks.create_task(self.sessions.run())
                tasks.create_task(supervisor.run())
        finally:
            self._group = None

    async def wait_idle(self, timeout_s: float) -> bool:
        return await self.engine.wait_idle(timeout_s)

    def listens_on(self, port: int) -> None:
        """Tickets name the port in use, if no other address was set."""
        if not self.config.advertise:
            self.advertise = f"{self.config.listen.rpartition(':')[0]}:{port}"

    def end_streams(self) -> None:
        self.sessions.end_all()

    @contextlib.contextmanager
    def session(self, session_id: str, beats: bool = False) -> Iterator[Session]:
        """A router's stream. Whichever way this ends, the sequences that were opened under it are closed. `beats`: the
        router promised signs of life."""
        session = self.sessions.begin(session_id, beats)
        # Of a stream that this one replaces: nobody knows which of their tokens were read.
        self.scheduler.close_session(session_id, End.LOST)
        self.engine.settle()
        try:
            yield session
        finally:
            if self.sessions.finish(session):
                self.scheduler.close_session(session_id)
                self.engine.settle()

    def open(self, session_id: str, sequence: kv_pb2.Sequence, ticket_id: int, span: Span = NO_SPAN) -> int:
        """Register a sequence that will be handed off; how many of its blocks are here already. Raises
        `InvalidArgument`, `ResourceExhausted`, `Unavailable`, `DeadlineExceeded`, or `FailedPrecondition` without a
        session."""
        seq = self._register(session_id, sequence, ticket_id, span, is_local=False)
        self.handoffs.opened(seq)
        return seq.blocks.num_cached_blocks

    def open_local(self, session_id: str, sequence: kv_pb2.Sequence, span: Span = NO_SPAN) -> None:
        """Register a sequence whose prompt is computed here. Raises what `open` raises."""
        seq = self._register(session_id, sequence, secrets.randbits(64), span, is_local=True)
        self.counters.inc("sequences_local")
        self.counters.inc("local_prompt_tokens", seq.num_unplanned_tokens)

    def _register(
        self, session_id: str, sequence: kv_pb2.Sequence, ticket_id: int, span: Span, is_local: bool
    ) -> DecodeSequence:
        self.require_ready()
        self.sessions.require(session_id)
        now_s = self.engine.clock()
        request = SequenceRequest.from_proto(sequence, now_s, self._limits)
        seq = self.scheduler.open(session_id, request, ticket_id, is_local=is_local, now_s=now_s)
        self.engine.records.opened(seq, self.config.block_size, span)
        self.engine.settle()
        return seq

    def close(self, session_id: str, sequence_id: int) -> bool:
        """Release a sequence; whether it was open."""
        was_open = self.scheduler.close((session_id, sequence_id), self.engine.clock())
        self.engine.settle()
        return was_open

    def status(self) -> worker_pb2.WorkerStatus:
        scheduler, blocks, slots = self.scheduler, self.scheduler.kv_stats(), self.handoff_context.slots
        status = self.base_status()
        status.num_open, status.num_waiting = scheduler.num_open, scheduler.num_waiting
        status.num_running = scheduler.num_running
        status.num_at_once, status.load_unit_ns = scheduler.num_at_once, round(scheduler.row_s * 1e9)
        status.step_ns = round(scheduler.step_s * 1e9)
        status.num_waiting_tokens = scheduler.num_waiting_tokens
        status.num_blocks_free, status.num_blocks_cached = blocks.num_free, blocks.num_cached
        status.num_blocks_held = blocks.num_held
        status.num_slots_free = self.config.num_slots if slots is None else slots.num_free
        status.num_grants_waiting = scheduler.num_waiting_for_blocks
        if slots is not None:
            status.num_slots_in_use, status.num_slots_quarantined = slots.num_in_use, slots.num_quarantined
            status.num_grants_waiting += slots.num_waiting
        if self._group is not None:
            status.rank_pids.extend(self._group.pids)
        return status

    async def hand_off(
        self, requests: AsyncIterator[kv_pb2.HandoffRequest], write: Write, span: Span = NO_SPAN
    ) -> None:
        """See `Handoffs.serve`."""
        try:
            await self.handoffs.serve(requests, write, span)
        finally:
            if not self._is_refreshing:
                with contextlib.suppress(Unavailable):  # stopping: nobody reads counters any more
                    self.handoff_context.spawn(self.refresh())

    async def refresh(self) -> None:
        """Fetch the ranks' transport counters, if they answer soon. Never raises."""
        group = self._group
        if group is None:
            return
        self._is_refreshing = True
        try:
            async with asyncio.timeout(_REFRESH_TIMEOUT_S):
                for rank in range(len(group.pids)):
                    reply = await _transport_stats(group, rank)
                    if group is self._group:
                        self._count_transport(rank, reply)
        except (Unavailable, TimeoutError):
            _log.debug("no transport counters: the ranks are lost or busy")
        finally:
            self._is_refreshing = False

    def on_ready(self, group: RankGroup) -> None:
        """Ranks stand: take sequences."""
        self._group = group
        self._transport_totals.clear()
        self.handoff_context.on_ready(group)
        self.engine.on_ready(group)
        self.sessions.tell_tickets(
            kv_pb2.Ticket(
                decode_worker_id=self.config.worker_id,
                decode_incarnation=self.incarnation,
                handoff_address=self.advertise,
                rank_addresses=[reachable_url(info.transport_address, self.advertise) for info in group.infos],
                layout_fingerprint=self.model.fingerprint,
            )
        )
        _log.info("%s is ready: %d ranks, layout %s", self.config.worker_id, len(group.pids), self.model.fingerprint)

    def on_lost(self, reason: str) -> None:
        """Ranks are gone: every sequence is lost, every block and slot free."""
        self._group = None
        self.counters.inc("ranks_lost")
        self.handoff_context.on_lost(reason)
        self.engine.on_lost()
        self.sessions.tell_tickets(kv_pb2.Ticket())

    def _count_transport(self, rank: int, reply: TransportStatsReply) -> None:
        """Add what is new since the last reply: the ranks count from their own start."""
        last = self._transport_totals.get(rank)
        self._transport_totals[rank] = reply
        self.counters.inc("stale_messages", reply.stale_messages - (last.stale_messages if last else 0))
        self.counters.inc("bytes_received", reply.bytes_received - (last.bytes_received if last else 0))


async def _transport_stats(group: RankGroup, rank: int) -> TransportStatsReply:
    operation = group.begin(rank, GetTransportStats(group.next_op_id()))
    try:
        reply = await operation.reply()
    finally:
        operation.close()
    assert isinstance(reply, TransportStatsReply)
    return reply


def _handoff_setup(config: DecodeConfig, model: WorkerModel) -> HandoffSetup:
    return HandoffSetup(
        layout=model.layout,
        layout_fingerprint=model.fingerprint,
        tp_size=config.tp_size,
        num_slots=config.num_slots,
        slot_bytes=config.slot_bytes,
        vocab_size=model.config.vocab_size,
        limits=config.handoff_limits,
    )
