"""All hand-offs of a decode worker: who may begin one, and which of them hears of what befell a sequence.

Knows gRPC's messages, but not its calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from baton.v1 import kv_pb2

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    Preempted,
    ResourceExhausted,
    TransferTimeout,
    Unavailable,
)
from common.message_bounds import MAX_NAME_CHARS, MAX_RANKS, check_chars, check_count
from common.telemetry.tracing import NO_SPAN, Span
from common.transport.pair_secret import SECRET_BYTES
from services.decode.handoff_context import HandoffContext
from services.decode.handoff_stream import HandoffStream, Write
from services.decode.request import BlocksReserved, DecodeSequence, End, SequenceEnded, SequenceState

MAX_EARLY: Final = 4096
BEGIN_TIMEOUT_S: Final = 5.0  # for the first message of a stream


class Handoffs:
    """All hand-offs of a worker."""

    def __init__(self, context: HandoffContext) -> None:
        self._context = context
        self._streams: dict[int, HandoffStream] = {}  # by ticket
        self._early: dict[int, asyncio.Future[None]] = {}  # by ticket, of sequences that are not open yet
        context.engine.on_ticket = self._on_ticket

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def num_early(self) -> int:
        """Hand-offs that wait for their sequences to be opened."""
        return len(self._early)

    async def serve(self, requests: AsyncIterator[kv_pb2.HandoffRequest], write: Write, span: Span = NO_SPAN) -> None:
        """One stream, from Begin to Joined; `span` is the sender's. Raises one error of the tree. Cancelling it ends
        the sequence; what is under way on the ranks is taken back by tasks of `HandoffContext.run`."""
        request = await _first(requests)
        if request is None or request.WhichOneof("message") != "begin":
            raise InvalidArgument("message", None, "a hand-off starts with begin")
        begin = request.begin
        seq = await self._claim(begin)
        stream = self._streams[begin.ticket_id] = HandoffStream(self._context, seq, begin, span)
        try:
            await stream.run(requests, write)
        finally:
            del self._streams[begin.ticket_id]
            stream.stop()

    def opened(self, seq: DecodeSequence) -> None:
        """A sequence was opened: its hand-off may wait for that already."""
        early = self._early.get(seq.ticket_id)
        if early is not None and not early.done():
            early.set_result(None)

    async def _claim(self, begin: kv_pb2.HandoffBegin) -> DecodeSequence:
        self._context.require_ranks()
        _check_begin(begin)
        fingerprint = self._context.setup.layout_fingerprint
        if begin.layout_fingerprint != fingerprint:
            raise FailedPrecondition(
                f"layout fingerprint {begin.layout_fingerprint} of {begin.prefill_worker_id} differs from {fingerprint}"
            )
        if not 1 <= begin.prefill_tp_size == len(begin.rank_peer_names):
            raise InvalidArgument("begin.rank_peer_names", len(begin.rank_peer_names), "one per prefill rank")
        tp_size = self._context.setup.tp_size
        if [len(secret) for secret in begin.connection_secrets] != [SECRET_BYTES] * tp_size:
            limit = f"{tp_size} of {SECRET_BYTES} bytes, one per decode rank"
            raise InvalidArgument("begin.connection_secrets", len(begin.connection_secrets), limit)
        find = self._context.engine.scheduler.find_ticket
        seq = find(begin.ticket_id)
        if seq is None:
            await self._wait_for_open(begin.ticket_id)
            seq = find(begin.ticket_id)
        if seq is None:
            raise NotFound("the ticket is not, or no longer, of this worker")
        if seq.state is not SequenceState.OPEN:
            raise FailedPrecondition(f"the ticket's sequence is {seq.state.name.lower()} already")
        if begin.ticket_id in self._streams:
            raise FailedPrecondition("another hand-off of this ticket is under way")
        return seq

    async def _wait_for_open(self, ticket_id: int) -> None:
        """The router tells both workers at once, so that a hand-off may begin before its sequence is open here."""
        if ticket_id in self._early:
            raise FailedPrecondition("another hand-off of this ticket is under way")
        if len(self._early) >= MAX_EARLY:
            raise ResourceExhausted(f"{MAX_EARLY} hand-offs wait for their sequences to be opened")
        self._early[ticket_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._context.setup.limits.open_grace_s):
                await self._early[ticket_id]
        except TimeoutError:
            return
        finally:
            del self._early[ticket_id]

    def _on_ticket(self, event: BlocksReserved | SequenceEnded) -> None:
        stream = self._streams.get(event.ticket_id)
        if stream is None:
            return
        if isinstance(event, BlocksReserved):
            stream.reserved.set()
        else:
            stream.fail(_error_of_end(event))


def _check_begin(begin: kv_pb2.HandoffBegin) -> None:
    check_count("begin.rank_peer_names", len(begin.rank_peer_names), MAX_RANKS, least=1)
    check_count("begin.connection_secrets", len(begin.connection_secrets), MAX_RANKS)
    for index, name in enumerate(begin.rank_peer_names):
        check_chars(f"begin.rank_peer_names[{index}]", name, MAX_NAME_CHARS)
    check_chars("begin.prefill_worker_id", begin.prefill_worker_id, MAX_NAME_CHARS, least=0)
    check_chars("begin.prefill_incarnation", begin.prefill_incarnation, MAX_NAME_CHARS, least=0)
    check_chars("begin.layout_fingerprint", begin.layout_fingerprint, MAX_NAME_CHARS, least=0)


async def _first(requests: AsyncIterator[kv_pb2.HandoffRequest]) -> kv_pb2.HandoffRequest | None:
    """None at the end of the stream. Raises `TransferTimeout`."""
    try:
        async with asyncio.timeout(BEGIN_TIMEOUT_S):
            return await anext(requests, None)
    except TimeoutError as error:
        raise TransferTimeout(f"the hand-off did not begin within {BEGIN_TIMEOUT_S:g} s") from error


def _error_of_end(event: SequenceEnded) -> BatonError:
    if event.end is End.DEADLINE:
        return DeadlineExceeded("the sequence's deadline passed during its hand-off")
    if event.end is End.PREEMPTED:
        return Preempted("the sequence gave way to others during its hand-off")
    if event.end is End.LOST:
        return Unavailable("the sequence was lost: the ranks died, or its router came with another stream")
    if event.end is End.FAILED:
        return InternalError(event.error)
    return Cancelled("the sequence was closed")
