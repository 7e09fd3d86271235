"""The Prefill service: one call is one sequence, from the queue to the moment when decode has joined it.

    queued ──► computing ──► first token written ──► handed off ──► PrefillCompleted
       └──────────┴───────────────┴── caller gone, deadline, failure ──► everything released, one typed error

Everything that a call holds is held by `_serve`'s frame: the job (queue entry, row, blocks) and the hand-off stream.
"""

from __future__ import annotations

import asyncio
import time

import grpc
from baton.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc, sampling_pb2

from common import errors
from common.config import split_address
from common.deadline import Deadline
from common.message_bounds import MAX_ADDRESS_CHARS, MAX_NAME_CHARS, MAX_RANKS, check_chars, check_count
from common.rpc.lateness import late_not_cancelled
from common.worker.sequence import MAX_REQUEST_ID_CHARS, SequenceLimits, SequenceRequest
from common.worker.step_plan import SampledToken
from services.prefill.decode_peers import DecodePeers
from services.prefill.engine import PrefillJob
from services.prefill.handoff import Handoff, first_error
from services.prefill.handoff_stats import HandoffStats
from services.prefill.request_record import PrefillRecord
from services.prefill.worker import PrefillWorker, Session

_WRITE_GRACE_S = 1.0
SERVICE_NAME = "baton.v1.Prefill"

_Context = grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]


class PrefillService(prefill_pb2_grpc.PrefillServicer):
    """See the proto. `peers` are the decode workers that tickets name."""

    def __init__(self, worker: PrefillWorker, peers: DecodePeers) -> None:
        self._worker = worker
        self._peers = peers
        config = worker.model.config
        self._limits = SequenceLimits(config.vocab_size, config.context_length)

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: _Context) -> None:  # type: ignore[override] # noqa: N802
        """Writes a FirstToken, then a PrefillCompleted."""
        worker, received_ns = self._worker, time.monotonic_ns()
        span = worker.tracing.begin("prefill", context, received_ns, worker_id=worker.config.worker_id)
        record = PrefillRecord(worker.counters, request.sequence.request_id[:MAX_REQUEST_ID_CHARS], received_ns, span)
        try:
            await self._serve(request, context, record)
        except BaseException as error:
            record.finish(error)
            raise
        record.finish(None)

    async def _serve(self, request: prefill_pb2.PrefillRequest, context: _Context, record: PrefillRecord) -> None:
        session = self._worker.session
        now_s = time.monotonic()
        sequence = SequenceRequest.from_proto(request.sequence, now_s, self._limits)
        _check_ticket(request.ticket, session, self._worker.config.kv_url)
        job = record.job = session.engine.submit(sequence)
        try:
            with late_not_cancelled(Deadline(sequence.deadline_s, sequence.deadline_s - now_s)):
                async with asyncio.timeout_at(sequence.deadline_s):
                    await self._run(session, job, request.ticket, context, record)
        except TimeoutError as error:
            raise errors.DeadlineExceeded("the deadline passed during prefill") from error
        finally:
            session.engine.release(job)

    async def _run(
        self, session: Session, job: PrefillJob, ticket: kv_pb2.Ticket, context: _Context, record: PrefillRecord
    ) -> None:
        async with self._peers.open(ticket.handoff_address, record.metadata) as stream:
            handoff = Handoff(session.setup, session.engine, session.sends, job, ticket, stream, self._worker.counters)
            record.stats = handoff.stats
            finish_reason = sampling_pb2.FINISH_REASON_UNSPECIFIED
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(handoff.run())
                    token = await job.first_token()
                    finish_reason = job.finish_reason(token)
                    await _write(context, _first_token(token, finish_reason))
            except* errors.BatonError as group:
                # A hand-off that was cancelled because the output ended may say that its stream broke.
                if not finish_reason:
                    raise first_error(group) from None
            finally:
                self._count(handoff.stats)
        record.completed_ns = time.monotonic_ns()
        await _write(context, _completed(job, handoff.stats))

    def _count(self, stats: HandoffStats) -> None:
        counters = self._worker.counters
        counters.inc("blocks_shipped", stats.num_blocks_shipped)
        counters.inc("blocks_reused", stats.num_blocks_reused)
        counters.inc("chunks_resent", stats.num_chunks_resent)


async def _write(context: _Context, response: prefill_pb2.PrefillResponse) -> None:
    """Write, and be done with it also when cancelled: gRPC cannot send a status while a write is under way."""
    writing = asyncio.create_task(context.write(response))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        done, _ = await asyncio.wait({writing}, timeout=_WRITE_GRACE_S)
        for write in done:
            write.exception()  # the caller is gone, which we know
        raise


def _check_ticket(ticket: kv_pb2.Ticket, session: Session, own_url: str) -> None:
    check_count("ticket.rank_addresses", len(ticket.rank_addresses), MAX_RANKS, least=1)
    for index, address in enumerate(ticket.rank_addresses):
        check_chars(f"ticket.rank_addresses[{index}]", address, MAX_ADDRESS_CHARS)
        _check_rank_address(f"ticket.rank_addresses[{index}]", address, own_url.partition("://")[0])
    check_chars("ticket.handoff_address", ticket.handoff_address, MAX_ADDRESS_CHARS)
    try:
        split_address(ticket.handoff_address)
    except ValueError as error:
        raise errors.InvalidArgument("ticket.handoff_address", ticket.handoff_address, str(error)) from error
    check_chars("ticket.decode_worker_id", ticket.decode_worker_id, MAX_NAME_CHARS, least=0)
    check_chars("ticket.decode_incarnation", ticket.decode_incarnation, MAX_NAME_CHARS, least=0)
    check_chars("ticket.layout_fingerprint", ticket.layout_fingerprint, MAX_NAME_CHARS, least=0)
    ours = session.setup.layout_fingerprint
    if ticket.layout_fingerprint != ours:
        theirs = f"{ticket.decode_worker_id!r} has layout {ticket.layout_fingerprint!r}"
        raise errors.FailedPrecondition(f"{theirs}, this worker has {ours}")


def _check_rank_address(field: str, address: str, our_scheme: str) -> None:
    scheme, _, host_and_port = address.partition("://")
    if scheme != our_scheme:
        raise errors.InvalidArgument(field, address, f"expected {our_scheme}://host:port, as this worker's ranks speak")
    try:
        split_address(host_and_port)
    except ValueError as error:
        raise errors.InvalidArgument(field, address, str(error)) from error


def _first_token(
    token: SampledToken, finish_reason: sampling_pb2.FinishReason.ValueType
) -> prefill_pb2.PrefillResponse:
    first = prefill_pb2.FirstToken(token_id=token.token_id, finish_reason=finish_reason)
    if token.logprob is not None:
        first.logprobs.chosen.token_id = token.token_id
        first.logprobs.chosen.logprob = token.logprob
        for token_id, logprob in token.top_logprobs or ():
            first.logprobs.top.add(token_id=token_id, logprob=logprob)
    return prefill_pb2.PrefillResponse(first_token=first)


def _completed(job: PrefillJob, stats: HandoffStats) -> prefill_pb2.PrefillResponse:
    completed = prefill_pb2.PrefillCompleted(
        queue_ns=job.scheduled_ns - job.received_ns,
        prefill_ns=job.sampled_ns - job.scheduled_ns,
        grant_ns=stats.grant_ns,
        transfer_ns=max(0, stats.transfer_ns),
        verify_ns=stats.verify_ns,
        num_blocks_shipped=stats.num_blocks_shipped,
        bytes_shipped=stats.bytes_shipped,
        num_blocks_reused=stats.num_blocks_reused,
        num_cached_tokens=job.num_cached_tokens,
        num_chunks_resent=stats.num_chunks_resent,
        transport=stats.transport,
        exposed_handoff_ns=stats.exposed_ns,
    )
    return prefill_pb2.PrefillResponse(completed=completed)
