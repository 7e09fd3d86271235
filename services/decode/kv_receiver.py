"""A decode rank's side of the hand-off: receives into staging slots, checks, and scatters into KV blocks.

    PostReceive ─▶ waiting for the peer ─▶ posted ─▶ complete ─▶ scattering ─▶ ReceiveDone
                            │                │           │            │
    CancelReceive ──────────┴────────────────┴───────────┘            └─ waits until it is over
                    no scatter starts after this; CancelDone says what became of the slot

Obeys the front: which slot, which blocks and when to give up are not decided here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass

from common.errors import Cancelled, InternalError
from common.kvcache.device_queue import DeviceWork
from common.kvcache.slot_copies import SlotCopies
from common.transport.base import CancelOutcome, Connection, PostedReceive
from common.worker.kv_replies import described, transport_stats_reply
from common.worker.rank_messages import (
    CancelDone,
    CancelReceive,
    FrontKVMessage,
    GetTransportStats,
    PostReceive,
    ReceiveDone,
    ReceivePosted,
    Scattered,
    SlotDrained,
)
from common.worker.rank_process import KVContext

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Operation:
    """One receive. `task` runs it; after `cancelled` is set it starts nothing more."""

    message: PostReceive
    task: asyncio.Task[None] | None = None
    connection: Connection | None = None
    posted: PostedReceive | None = None
    scatter: asyncio.Future[None] | None = None
    scattered: Scattered | None = None  # what the storage was told to write
    cancelled: bool = False


class KVReceiver:
    """See `common.worker.rank_process.KVService`. Runs on the KV thread's event loop."""

    def __init__(self, context: KVContext) -> None:
        self._endpoint = context.endpoint
        self._slots = context.slots  # uint8 [num_slots, slot_bytes]
        self._storage = context.runtime.storage
        self._reply = context.reply
        self._operations: dict[int, _Operation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._copies = SlotCopies(context.slots.device, "scatter")

    def handle(self, message: FrontKVMessage) -> None:
        """Start an operation; its replies follow. Never blocks, never raises."""
        if isinstance(message, PostReceive):
            operation = self._operations[message.op_id] = _Operation(message)
            operation.task = self._start(self._receive(operation))
        elif isinstance(message, CancelReceive):
            self._start(self._cancel(message))
        elif isinstance(message, GetTransportStats):
            self._reply(transport_stats_reply(message.op_id, self._endpoint.stats()))
        else:
            _log.error("a decode rank was sent %s", type(message).__name__)

    async def close(self) -> None:
        """End every operation; the endpoint's owner closes the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._copies.close()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a KV operation failed", exc_info=error)

    async def _receive(self, operation: _Operation) -> None:
        message = operation.message
        try:
            await self._post(operation)
        except Exception as error:  # whatever it is, the front waits for an answer
            del self._operations[message.op_id]
            self._reply(ReceivePosted(message.op_id, *described(error)))
            return
        posted = operation.posted
        assert posted is not None
        self._reply(ReceivePosted(message.op_id))
        transfer_ns = 0
        try:
            await posted.wait()
            complete_ns = time.monotonic_ns()
            transfer_ns = complete_ns - posted.arrived_ns
            if operation.cancelled:
                return
            await self._scatter(operation)
        except Cancelled:
            return  # _cancel answers
        except Exception as error:
            # The operation stays: the front cancels it to learn about the slot.
            self._reply(ReceiveDone(message.op_id, transfer_ns, 0, *described(error)))
            return
        if not operation.cancelled:
            del self._operations[message.op_id]
        verify_ns = time.monotonic_ns() - complete_ns
        self._reply(ReceiveDone(message.op_id, transfer_ns, verify_ns, scattered=operation.scattered))

    async def _post(self, operation: _Operation) -> None:
        message = operation.message
        operation.connection = await self._endpoint.wait_for_peer(
            message.peer_name, message.connect_timeout_s, message.peer_secret
        )
        end = message.offset + message.num_bytes
        if not 0 <= message.slot < self._slots.shape[0] or end > self._slots.shape[1]:
            raise InternalError(f"bytes [{message.offset}, {end}) of slot {message.slot} do not exist")
        buffer = self._slots[message.slot, message.offset : end]
        operation.posted = operation.connection.post_receive(message.tag, buffer)

    async def _scatter(self, operation: _Operation) -> None:
        """Check and scatter. Cancelling this leaves a scatter that `_cancel` waits for."""
        operation.scatter = self._copies.run(lambda: self._start_scatter(operation))
        await asyncio.shield(operation.scatter)

    def _start_scatter(self, operation: _Operation) -> DeviceWork | None:
        if operation.cancelled:
            return None
        message = operation.message
        slot = self._slots[message.slot, message.offset : message.offset + message.num_bytes]
        written = operation.scattered = Scattered(
            message.first_local_head, message.num_heads, message.first_layer, message.num_layers, message.block_ids
        )
        return self._storage.start_scatter(
            written.block_ids,
            written.first_local_head,
            written.num_heads,
            slot,
            message.tag,
            range(written.first_layer, written.first_layer + written.num_layers),
        )

    async def _cancel(self, message: CancelReceive) -> None:
        operation = self._operations.pop(message.op_id, None)
        if operation is None:  # it completed while the cancel was on its way, or never came to be
            self._reply(CancelDone(message.op_id, CancelOutcome.DRAINED.value))
            return
        operation.cancelled = True
        outcome = CancelOutcome.NOT_ADVERTISED
        if operation.posted is not None:
            outcome = await operation.posted.cancel(message.timeout_s)
        if operation.scatter is not None:
            await asyncio.wait({operation.scatter})
        elif operation.task is not None:
            operation.task.cancel()
        self._reply(CancelDone(message.op_id, outcome.value))
        if outcome is CancelOutcome.IN_DOUBT and operation.connection is not None:
            # Nothing but the end of the connection ends the doubt; its other receives fail, and are offered again.
            await operation.connection.close()
            await operation.connection.drained()
            self._reply(SlotDrained(message.op_id))
