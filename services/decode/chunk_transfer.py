"""One chunk on its way into a staging slot: a receive per leg on the decode ranks, posted, awaited or taken back.

Knows ranks and legs, but no stream, no sequence and no prefix cache.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.v1 import kv_pb2

from common.errors import TransferError, TransferTimeout, Unavailable
from common.kvcache.grant import SlotHandle
from common.kvcache.layout import Coverage, KVLayout, Leg, heads_of_rank
from common.worker.rank_group import Operation, RankGroup, error_of
from common.worker.rank_messages import CancelDone, CancelReceive, PostReceive, ReceiveDone, ReceivePosted

# Values of common.transport.base.CancelOutcome; that module needs torch, which a front does not load.
NOT_ADVERTISED = "not_advertised"
DRAINED = "drained"
PEER_LOST = "peer_lost"
IN_DOUBT = "in_doubt"
ANSWER_GRACE_S = 1.0  # for a rank to say what became of what had a time limit of its own
_HANG_TIMEOUT_S = 60.0  # a rank that has not taken a receive back by then never will: a scatter may wait for its device
OUTCOMES = (NOT_ADVERTISED, DRAINED, PEER_LOST, IN_DOUBT)


@dataclass(frozen=True, slots=True)
class TransferTimes:
    """On the slowest rank."""

    transfer_ns: int
    verify_ns: int


@dataclass(slots=True, eq=False)
class _Receive:
    leg: Leg
    tag: int
    num_bytes: int
    operation: Operation
    settled: bool = False  # nothing is posted, or the bytes are in place


class ChunkTransfer:
    """All legs of one chunk. `post`, then `arrive`; whatever happens, `take_back` must follow."""

    def __init__(
        self,
        group: RankGroup,
        layout: KVLayout,
        handle: SlotHandle,
        block_ids: Sequence[int],
        layers: range,
        cancel_timeout_s: float,
    ) -> None:
        self._group = group
        self._layout = layout
        self._handle = handle
        self._block_ids = list(block_ids)
        self._layers = layers
        self._cancel_timeout_s = cancel_timeout_s
        self._receives: list[_Receive] = []
        self.advertised = False  # whether the tags were told to the sender

    @property
    def num_bytes(self) -> int:
        """Of all legs, headers included."""
        return sum(receive.num_bytes for receive in self._receives)

    async def post(
        self, legs: Sequence[Leg], peer_names: Sequence[str], peer_secrets: Sequence[bytes], connect_timeout_s: float
    ) -> None:
        """Post the receives on every rank; a peer is known by the name of the prefill rank and the secret that it says
        to the decode rank. Raises the first error that a rank reports (a `TransferError`)."""
        decode_tp = len(self._group.pids)
        fill_bytes: Counter[int] = Counter()
        for number, leg in enumerate(legs):
            rank = leg.decode_rank
            num_bytes = self._layout.leg_bytes(len(self._block_ids), len(self._layers), leg.num_heads)
            message = PostReceive(
                op_id=self._group.next_op_id(),
                peer_name=peer_names[leg.prefill_rank],
                peer_secret=peer_secrets[rank],
                slot=self._handle.slot,
                offset=fill_bytes[rank],
                num_bytes=num_bytes,
                tag=self._handle.tag(number),
                block_ids=self._block_ids,
                first_local_head=leg.first_head - heads_of_rank(self._layout.num_kv_heads, decode_tp, rank).start,
                num_heads=leg.num_heads,
                first_layer=self._layers.start,
                num_layers=len(self._layers),
                connect_timeout_s=connect_timeout_s,
            )
            fill_bytes[rank] += num_bytes
            operation = self._group.begin(rank, message)
            self._receives.append(_Receive(leg, message.tag, num_bytes, operation))
        try:
            async with asyncio.timeout(connect_timeout_s + ANSWER_GRACE_S):
                for receive in self._receives:
                    await self._await_posted(receive)
        except TimeoutError as error:
            raise TransferTimeout("a rank did not say whether its peer is connected") from error

    def leg_grants(self) -> list[kv_pb2.LegGrant]:
        """What the sender must know; after this the legs count as advertised."""
        self.advertised = True
        return [
            kv_pb2.LegGrant(
                prefill_rank=receive.leg.prefill_rank,
                decode_rank=receive.leg.decode_rank,
                first_head=receive.leg.first_head,
                num_heads=receive.leg.num_heads,
                tag=receive.tag,
                num_bytes=receive.num_bytes,
            )
            for receive in self._receives
        ]

    async def arrive(self, timeout_s: float) -> TransferTimes:
        """Wait until every leg is in the blocks. Raises the first failure, `TransferTimeout` when the time is up, or
        `TransferError` unless what the ranks wrote is what the chunk needs, each of it once."""
        waits = [asyncio.create_task(self._await_leg(receive)) for receive in self._receives]
        try:
            done, pending = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            replies = [task.result() for task in done]
        finally:
            for task in waits:
                if not task.cancel() and not task.cancelled():
                    task.exception()  # the first failure is raised; asyncio must not report the others
        if pending:
            raise TransferTimeout(f"{len(pending)} of {len(waits)} legs did not arrive within {timeout_s:.1f} s")
        self._check_coverage({reply.op_id: reply for reply in replies})
        return TransferTimes(max(r.transfer_ns for r in replies), max(r.verify_ns for r in replies))

    def _check_coverage(self, replies: Mapping[int, ReceiveDone]) -> None:
        coverage = Coverage(self._layout.num_kv_heads, len(self._group.pids), self._layers, self._block_ids)
        for receive in self._receives:
            written = replies[receive.operation.op_id].scattered
            if written is None:
                raise TransferError(f"rank {receive.leg.decode_rank} does not say what it wrote")
            coverage.mark(
                receive.leg.decode_rank,
                range(written.first_local_head, written.first_local_head + written.num_heads),
                range(written.first_layer, written.first_layer + written.num_layers),
                written.block_ids,
            )
        coverage.check_complete()

    async def take_back(self) -> tuple[list[str], dict[int, list[Operation]]]:
        """Cancel what has not arrived. When this returns, no rank writes to the chunk's blocks any more.

        Returns the outcome of each leg that was taken back, and by rank the operations in doubt, still open: each gets
        a `SlotDrained`. Raises `Unavailable` if a rank is lost.
        """
        if self._group.lost_reason is not None:
            raise Unavailable(self._group.lost_reason)
        unsettled = [receive for receive in self._receives if not receive.settled]
        for receive in unsettled:
            self._group.follow_up(
                receive.leg.decode_rank, CancelReceive(receive.operation.op_id, self._cancel_timeout_s)
            )
        outcomes: list[str] = []
        doubtful: dict[int, list[Operation]] = {}
        for receive in unsettled:
            reply = await self._await_cancelled(receive)
            if reply.outcome == IN_DOUBT:
                doubtful.setdefault(receive.leg.decode_rank, []).append(receive.operation)
            outcomes.append(reply.outcome if self.advertised or reply.outcome == IN_DOUBT else NOT_ADVERTISED)
        self._close(doubtful)
        return outcomes, doubtful

    def _close(self, doubtful: dict[int, list[Operation]]) -> None:
        kept = {operation.op_id for operations in doubtful.values() for operation in operations}
        for receive in self._receives:
            receive.settled = True
            if receive.operation.op_id not in kept:
                receive.operation.close()

    async def _await_posted(self, receive: _Receive) -> None:
        reply = await receive.operation.reply()
        assert isinstance(reply, ReceivePosted)
        if reply.error_kind:
            receive.settled = True
            raise error_of(reply.error_kind, reply.detail)

    async def _await_cancelled(self, receive: _Receive) -> CancelDone:
        """A rank that never answers may write to the blocks for ever: nothing but its end gives them back."""
        try:
            async with asyncio.timeout(self._cancel_timeout_s + _HANG_TIMEOUT_S):
                while not isinstance(reply := await receive.operation.reply(), CancelDone):
                    pass  # answers that were under way when we cancelled
        except TimeoutError as error:
            reason = f"rank {receive.leg.decode_rank} does not take back a receive"
            self._group.lose(reason)
            raise Unavailable(reason) from error
        return reply

    async def _await_leg(self, receive: _Receive) -> ReceiveDone:
        reply = await receive.operation.reply()
        assert isinstance(reply, ReceiveDone)
        if reply.error_kind:
            raise error_of(reply.error_kind, reply.detail)
        receive.settled = True
        return reply
