"""Send slots, and the sends that fill them: one send gathers a chunk on every rank and puts it on the wire.

             acquire               every leg is done, slot free
    FREE ───────────────▶ TAKEN ───────────────────────────────▶ FREE
                            │ a leg is in doubt (timed out)         ▲
                            ▼                                       │ SlotDrained of every leg in doubt
                        QUARANTINED ────────────────────────────────┘

A send outlives the request that started it: cancelling the request never frees a slot or a block that a rank still
reads. Its blocks are read until all legs are done; `on_read_done` says so. Knows no gRPC and no schedule.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from common import errors
from common.kvcache.grant import SlotHandle
from common.worker.rank_group import Operation, RankGroup, error_of
from common.worker.rank_messages import ConnectDone, ConnectPeer, RankKVMessage, SendDone, SendLeg
from common.worker.staging_slots import StagingSlots
from services.prefill.chunk_shapes import ChunkShape
from services.prefill.legs import DecodeRank, RankLeg
from services.prefill.metrics import PrefillMetrics

ANSWER_GRACE_S = 1.0  # for a rank to say what became of what had a time limit of its own
_MAX_WAITERS = 1 << 16  # each is a chunk in flight of an admitted prompt, which the scheduler bounds


class Sends:
    """The slots of one `RankGroup`, in lock-step on all ranks. Sends run as tasks of `run`."""

    def __init__(
        self, ranks: RankGroup, num_slots: int, counters: PrefillMetrics, on_change: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._counters = counters
        self.slots = StagingSlots(num_slots, num_ranks=1, max_waiters=_MAX_WAITERS, on_change=on_change)
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Parent of all sends, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._tasks = None

    async def connect(self, rank: int, peer: DecodeRank, timeout_s: float) -> str:
        """Connect a rank to a decode rank, or find that it is; returns the lane. Raises `PeerLost`,
        `TransferTimeout` or `Unavailable`. Cancelling it leaves a connection at most."""
        operation = self._ranks.begin(rank, ConnectPeer(self._ranks.next_op_id(), peer.address, peer.secret, timeout_s))
        try:
            async with asyncio.timeout(timeout_s + ANSWER_GRACE_S):
                done = await operation.reply()
        except TimeoutError as error:
            raise errors.TransferTimeout(
                f"rank {rank} did not say whether it is connected to {peer.address}"
            ) from error
        finally:
            operation.close()
        assert isinstance(done, ConnectDone)
        if done.error_kind:
            raise error_of(done.error_kind, done.detail)
        return done.lane

    def start(
        self,
        handle: SlotHandle,
        legs: Sequence[RankLeg],
        shape: ChunkShape,
        block_ids: Sequence[int],
        step_id: int,
        timeout_s: float,
        on_read_done: Callable[[], None],
        on_sent: Callable[[int], None],
        on_failure: Callable[[errors.BatonError], None],
    ) -> None:
        """Gather layers of the blocks into the slot and send them; the slot comes back by itself.

        Ranks begin when the step `step_id` has stored the layers (-1: they are there). `on_read_done` is called exactly
        once, when no rank reads the blocks any more; then `on_sent` with the nanoseconds that the slowest rank took to
        gather and send, or `on_failure` if the legs did not all leave.
        """
        if self._tasks is None:
            on_read_done()
            on_failure(errors.Unavailable("the worker is stopping"))
            return
        messages = [
            SendLeg(
                self._ranks.next_op_id(),
                leg.peer.address,
                leg.peer.secret,
                handle.slot,
                leg.offset,
                leg.num_bytes,
                leg.tag,
                list(block_ids),
                leg.first_local_head,
                leg.num_heads,
                shape.first_layer,
                shape.num_layers,
                step_id,
                timeout_s,
            )
            for leg in legs
        ]
        ranks = [leg.rank for leg in legs]
        self._tasks.create_task(self._send(handle, ranks, messages, on_read_done, on_sent, on_failure))

    async def _send(
        self,
        handle: SlotHandle,
        ranks: Sequence[int],
        messages: Sequence[SendLeg],
        on_read_done: Callable[[], None],
        on_sent: Callable[[int], None],
        on_failure: Callable[[errors.BatonError], None],
    ) -> None:
        operations: list[Operation] = []
        try:
            try:
                for rank, message in zip(ranks, messages, strict=True):
                    operations.append(self._ranks.begin(rank, message))
                replies = [_sent(await operation.reply()) for operation in operations]
            finally:
                on_read_done()
            failed = next((reply for reply in replies if reply.error_kind), None)
            if failed is not None:
                on_failure(error_of(failed.error_kind, failed.detail))
            else:
                on_sent(max(reply.send_ns for reply in replies))
            doubtful = [op for op, reply in zip(operations, replies, strict=True) if not reply.slot_free]
            with contextlib.suppress(errors.Unavailable):  # the ranks are lost, and the slot with them
                await self._settle(handle, doubtful)
        except errors.Unavailable as error:
            on_failure(error)  # the ranks are lost before they said what became of the legs
        finally:
            for operation in operations:
                operation.close()

    async def _settle(self, handle: SlotHandle, doubtful: Sequence[Operation]) -> None:
        """Free the slot, at once or when every leg in doubt has drained."""
        if doubtful:
            self.slots.quarantine(handle, {0})
            self._counters.inc("slots_quarantined")
            await self.slots.await_drained(handle, 0, doubtful)
        else:
            self.slots.release(handle)


def _sent(reply: RankKVMessage) -> SendDone:
    assert isinstance(reply, SendDone)
    return reply
