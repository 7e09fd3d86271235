"""A prefill rank's side of the hand-off: gathers heads of KV blocks into a send slot and puts the slot on the wire.

    SendLeg ─▶ waiting for its step ─▶ gathering ─▶ sending ─▶ SendDone(slot_free)
                                                       │ time is up, or the peer is lost
                                                       └─▶ SendDone(in doubt) ─▶ connection drained ─▶ SlotDrained

The layers of a step leave while it computes the next ones, so that little is left to send when it is over (as Splitwise
does, arXiv 2311.18677, section IV-C).

Obeys the front: which slot, which blocks and when to try again are not decided here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine

import torch

from common.errors import BatonError, InternalError, PeerLost, TransferTimeout
from common.kvcache.device_queue import DeviceWork
from common.kvcache.layout import HEADER_BYTES
from common.kvcache.slot_copies import SlotCopies
from common.transport.base import Connection
from common.worker.kv_replies import described, transport_stats_reply
from common.worker.rank_messages import (
    ConnectDone,
    ConnectPeer,
    FrontKVMessage,
    GetTransportStats,
    SendDone,
    SendLeg,
    SlotDrained,
)
from common.worker.rank_process import KVContext

_log = logging.getLogger(__name__)
_Peer = tuple[str, bytes]  # address, and the secret that we say there


class KVSender:
    """See `common.worker.rank_process.KVService`. Runs on the KV thread's event loop."""

    def __init__(self, context: KVContext) -> None:
        self._endpoint = context.endpoint
        self._slots = context.slots  # uint8 [num_slots, slot_bytes]
        self._storage = context.runtime.storage
        self._marks = context.runtime.marks
        self._reply = context.reply
        self._scheme = context.start.transport_url.partition("://")[0]
        self._corrupt_every = context.start.corrupt_every
        self._num_legs = 0
        self._connections: dict[_Peer, Connection] = {}
        self._attempts: dict[_Peer, asyncio.Task[Connection]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._copies = SlotCopies(context.slots.device, "gather")

    def handle(self, message: FrontKVMessage) -> None:
        """Start an operation; its replies follow. Never blocks, never raises."""
        if isinstance(message, ConnectPeer):
            self._start(self._connect(message))
        elif isinstance(message, SendLeg):
            self._start(self._send(message))
        elif isinstance(message, GetTransportStats):
            self._reply(transport_stats_reply(message.op_id, self._endpoint.stats()))
        else:
            _log.error("a prefill rank was sent %s", type(message).__name__)

    async def close(self) -> None:
        """End every operation; the endpoint's owner closes the connections."""
        tasks = [*self._tasks, *self._attempts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._copies.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a KV operation failed", exc_info=error)

    async def _connect(self, message: ConnectPeer) -> None:
        try:
            connection = await self._connection((message.address, message.secret), message.timeout_s)
            lane = connection.lane
        except Exception as error:  # whatever it is, the front waits for an answer
            self._reply(ConnectDone(message.op_id, "", *described(error)))
            return
        self._reply(ConnectDone(message.op_id, lane if lane == self._scheme else f"{self._scheme}:{lane}"))

    async def _connection(self, peer: _Peer, timeout_s: float) -> Connection:
        """The connection to a decode rank. Whoever asks while it is being made shares the attempt and its outcome."""
        connection = self._connections.get(peer)
        if connection is not None and connection.alive:
            return connection
        attempt = self._attempts.get(peer)
        if attempt is None:
            attempt = self._attempts[peer] = asyncio.create_task(self._open(peer, timeout_s))
            attempt.add_done_callback(lambda _: self._attempts.pop(peer, None))
        return await asyncio.shield(attempt)

    async def _open(self, peer: _Peer, timeout_s: float) -> Connection:
        for other, dead in [item for item in self._connections.items() if not item[1].alive]:
            del self._connections[other]
            self._start(dead.close())
        address, secret = peer
        connection = await self._endpoint.connect(address, timeout_s, secret)
        self._connections[peer] = connection
        return connection

    async def _send(self, message: SendLeg) -> None:
        deadline_s = time.monotonic() + message.timeout_s
        start_ns = time.monotonic_ns()
        gathered_ns = 0
        try:
            await self._stored(message, deadline_s)
            start_ns = time.monotonic_ns()
            connection = self._connections.get((message.address, message.secret))
            if connection is None or not connection.alive:
                raise PeerLost(f"there is no connection to {message.address}")
            slot = self._slot(message)
            await asyncio.shield(self._copies.run(lambda: self._gather(message, slot)))
            self._corrupt(slot)
            gathered_ns = time.monotonic_ns() - start_ns
            if time.monotonic() >= deadline_s:
                raise TransferTimeout("the time of the grant was over before the leg was gathered")
        except Exception as error:  # whatever it is, the front waits for an answer
            self._reply(SendDone(message.op_id, gathered_ns, 0, True, *described(error)))
            return
        failure = await _carry(connection, message.tag, slot, deadline_s - time.monotonic())
        sent_ns = time.monotonic_ns() - start_ns
        if failure is None:
            self._reply(SendDone(message.op_id, gathered_ns, sent_ns, True))
            return
        self._reply(SendDone(message.op_id, gathered_ns, sent_ns, False, *described(failure)))
        # Bytes that are under way cannot be recalled. Nothing but the end of the connection ends the doubt; its other
        # sends fail, and are offered again.
        await connection.close()
        await connection.drained()
        self._reply(SlotDrained(message.op_id))

    async def _stored(self, message: SendLeg, deadline_s: float) -> None:
        """Wait until the layers are there. Raises `TransferTimeout`."""
        if message.step_id < 0:
            return
        if self._marks is None:
            raise InternalError(f"step {message.step_id} leaves no marks on this rank")
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await self._marks.reached(message.step_id, message.first_layer + message.num_layers)
        except TimeoutError as error:
            raise TransferTimeout("the time of the grant was over before the leg was computed") from error

    def _slot(self, message: SendLeg) -> torch.Tensor:
        """uint8 [message.num_bytes]"""
        num_slots, slot_bytes = self._slots.shape
        end = message.offset + message.num_bytes
        if not 0 <= message.slot < num_slots or not 0 <= message.offset < end <= slot_bytes:
            raise InternalError(f"bytes [{message.offset}, {end}) of slot {message.slot} do not exist")
        return self._slots[message.slot, message.offset : end]

    def _gather(self, message: SendLeg, slot: torch.Tensor) -> DeviceWork:
        """Fill slot, uint8 [message.num_bytes]."""
        layers = range(message.first_layer, message.first_layer + message.num_layers)
        num_bytes = self._storage.leg_bytes(len(message.block_ids), message.num_heads, layers)
        if num_bytes != message.num_bytes:
            raise InternalError(f"a leg of {num_bytes} bytes was granted {message.num_bytes}")
        return self._storage.start_gather(
            message.block_ids, message.first_local_head, message.num_heads, slot, message.tag, layers
        )

    def _corrupt(self, slot: torch.Tensor) -> None:
        """Fault injection for tests: flip a bit of every n-th leg, uint8 [message.num_bytes], behind its digest."""
        self._num_legs += 1
        if self._corrupt_every and self._num_legs % self._corrupt_every == 0:
            slot[HEADER_BYTES + (slot.numel() - HEADER_BYTES) // 2] ^= 1
            if slot.is_cuda:
                torch.cuda.synchronize(slot.device)  # the transport knows nothing of streams


async def _carry(connection: Connection, tag: int, slot: torch.Tensor, timeout_s: float) -> BatonError | None:
    """Send slot, uint8 [num_bytes]. With an error, whether bytes of it are still read is unknown."""
    sending = asyncio.create_task(connection.send(tag, slot))
    try:
        done, _ = await asyncio.wait({sending}, timeout=max(0.0, timeout_s))
    finally:
        sending.add_done_callback(_forget)
        if not sending.done():
            sending.cancel()
    if not done:
        return TransferTimeout(f"the leg was not sent within {timeout_s:.3f} s")
    error = sending.exception()
    if error is None:
        return None
    return error if isinstance(error, BatonError) else InternalError(str(error))


def _forget(task: asyncio.Task[None]) -> None:
    """Whatever the send ended with later is of no interest."""
    if not task.cancelled():
        task.exception()
