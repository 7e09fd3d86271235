"""A decode rank's receives over the in-process transport: real storage, real digests, faults on the wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch

from common.kvcache.storage import KVStorage
from common.transport.faults import Fault, MessageInfo
from common.transport.inproc import InprocConnection, InprocNetwork
from common.worker.rank_messages import (
    CancelDone,
    CancelReceive,
    GetTransportStats,
    KVMessage,
    PostReceive,
    RankKVMessage,
    ReceiveDone,
    ReceivePosted,
    Scattered,
    SlotDrained,
    TransportStatsReply,
)
from common.worker.rank_process import KVContext
from services.decode.kv_receiver import KVReceiver

SLOT_BYTES = 1 << 14
SECRET = bytes(range(16))
TAG = 0xABCD_0000_0000_0001
BLOCKS_SENT = [5, 1, 2]
BLOCKS_RECEIVED = [0, 7, 3]
_Reply = TypeVar("_Reply", bound=KVMessage)


def make_storage(fill: float) -> KVStorage:
    storage = KVStorage(2, 8, 2, 4, 8, torch.float32, torch.device("cpu"))
    storage.kv.fill_(fill)
    return storage


class Rank:
    """A receiver, a sender that is connected to it, and what the receiver replied."""

    def __init__(self, network: InprocNetwork) -> None:
        torch.set_num_threads(1)
        self.storage = make_storage(0.0)
        self.source = make_storage(0.0)
        self.source.kv.copy_(torch.arange(self.source.kv.numel()).view_as(self.source.kv))
        self.slots = torch.zeros((2, SLOT_BYTES), dtype=torch.uint8)
        self.endpoint = network.open("inproc://decode", "decode/0")
        self.sender = network.open("inproc://prefill", "prefill/0")
        self.num_bytes = self.source.leg_bytes(len(BLOCKS_SENT), 1)
        self._replies: asyncio.Queue[RankKVMessage] = asyncio.Queue()
        runtime = SimpleNamespace(storage=self.storage, device=torch.device("cpu"))
        context = KVContext(self.endpoint, cast(Any, runtime), self.slots, cast(Any, None), self._replies.put_nowait)
        self.receiver = KVReceiver(context)

    async def connect(self) -> InprocConnection:
        return await self.sender.connect("inproc://decode", 20.0, SECRET)

    def post(self, op_id: int = 1, slot: int = 0, connect_timeout_s: float = 5.0) -> None:
        """Head 1 of three blocks."""
        self.receiver.handle(
            PostReceive(
                op_id,
                "prefill/0",
                SECRET,
                slot,
                64,
                self.num_bytes,
                TAG,
                BLOCKS_RECEIVED,
                1,
                1,
                0,
                2,
                connect_timeout_s,
            )
        )

    def gathered(self) -> torch.Tensor:
        """uint8 [num_bytes]: what an honest sender sends."""
        slot = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
        self.source.gather(BLOCKS_SENT, 1, 1, slot, TAG)
        return slot[: self.num_bytes]

    async def reply(self, kind: type[_Reply]) -> _Reply:
        async with asyncio.timeout(20):
            message = await self._replies.get()
        assert isinstance(message, kind), message
        return message

    @property
    def num_unread_replies(self) -> int:
        return self._replies.qsize()

    def assert_nothing_written(self) -> None:
        assert not self.storage.kv.any(), "a block was written"


@contextlib.asynccontextmanager
async def running_rank(script: Callable[[MessageInfo], Fault | None] = lambda _: None) -> AsyncIterator[Rank]:
    rank = Rank(InprocNetwork(script))
    try:
        yield rank
    finally:
        await rank.receiver.close()
        await rank.endpoint.close()
        await rank.sender.close()


async def test_a_leg_that_arrives_is_in_its_heads_of_its_blocks() -> None:
    async with running_rank() as rank:
        connection = await rank.connect()
        rank.post()
        await rank.reply(ReceivePosted)
        await connection.send(TAG, rank.gathered())
        done = await rank.reply(ReceiveDone)
        assert (done.error_kind, done.op_id) == ("", 1)
        assert done.scattered == Scattered(1, 1, 0, 2, BLOCKS_RECEIVED)
        assert torch.equal(rank.storage.kv[:, BLOCKS_RECEIVED, :, 1], rank.source.kv[:, BLOCKS_SENT, :, 1])
        assert not rank.storage.kv[:, :, :, 0].any(), "the other head was written"


async def test_a_receive_waits_for_its_peer_to_connect() -> None:
    async with running_rank() as rank:
        rank.post()
        await asyncio.sleep(0)
        assert rank.num_unread_replies == 0
        await rank.connect()
        assert (await rank.reply(ReceivePosted)).error_kind == ""


async def test_a_failure_that_nobody_foresaw_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_for_peer(*_: object) -> None:
        raise RuntimeError("the library's own")

    async with running_rank() as rank:
        monkeypatch.setattr(rank.endpoint, "wait_for_peer", wait_for_peer)
        rank.post()
        assert (await rank.reply(ReceivePosted)).error_kind == "InternalError"


async def test_a_peer_that_does_not_come_is_reported_and_nothing_is_posted() -> None:
    async with running_rank() as rank:
        rank.post(connect_timeout_s=0.01)
        assert (await rank.reply(ReceivePosted)).error_kind == "TransferTimeout"


@pytest.mark.parametrize(
    ("fault", "error_kind", "outcome"),
    [
        (Fault(flip_byte=700), "DigestMismatch", "drained"),
        (Fault(flip_byte=0), "DigestMismatch", "drained"),
        (Fault(resize_bytes=100), "Truncated", "drained"),
        (Fault(lose_connection=True), "PeerLost", "peer_lost"),
    ],
)
async def test_wrong_bytes_never_reach_a_block(fault: Fault, error_kind: str, outcome: str) -> None:
    async with running_rank(lambda _: fault) as rank:
        connection = await rank.connect()
        rank.post()
        await rank.reply(ReceivePosted)
        with contextlib.suppress(Exception):  # the sender learns of a lost connection, and only of that
            await connection.send(TAG, rank.gathered())
        assert (await rank.reply(ReceiveDone)).error_kind == error_kind
        rank.receiver.handle(CancelReceive(1, 5.0))
        assert (await rank.reply(CancelDone)).outcome == outcome
        rank.assert_nothing_written()


async def test_a_cancel_before_the_peer_came_was_never_advertised() -> None:
    async with running_rank() as rank:
        rank.post()
        await asyncio.sleep(0)
        rank.receiver.handle(CancelReceive(1, 5.0))
        assert (await rank.reply(CancelDone)).outcome == "not_advertised"
        await rank.connect()
        await asyncio.sleep(0)
        assert rank.num_unread_replies == 0, "it was posted after the cancel"


async def test_what_is_sent_after_a_cancel_is_stale() -> None:
    async with running_rank() as rank:
        connection = await rank.connect()
        rank.post()
        await rank.reply(ReceivePosted)
        rank.receiver.handle(CancelReceive(1, 5.0))
        assert (await rank.reply(CancelDone)).outcome == "drained"
        await connection.send(TAG, rank.gathered())
        rank.receiver.handle(GetTransportStats(2))
        assert (await rank.reply(TransportStatsReply)).stale_messages == 1
        assert not rank.slots.any(), "bytes reached the slot"
        rank.assert_nothing_written()


async def test_a_cancel_in_the_middle_of_a_message_is_in_doubt_until_the_connection_is_gone() -> None:
    stall = asyncio.Event()
    async with running_rank(lambda _: Fault(stall=stall)) as rank:
        connection = await rank.connect()
        rank.post()
        await rank.reply(ReceivePosted)
        sending = asyncio.create_task(connection.send(TAG, rank.gathered()))
        for _ in range(10):  # turns of the loop, in which half of the message is written
            await asyncio.sleep(0)
        assert rank.slots.any()
        rank.receiver.handle(CancelReceive(1, 0.01))
        assert (await rank.reply(CancelDone)).outcome == "in_doubt"
        assert (await rank.reply(SlotDrained)).op_id == 1
        rank.slots.zero_()
        stall.set()
        await asyncio.wait({sending})
        assert isinstance(sending.exception(), Exception)
        assert not rank.slots.any(), "bytes came after the slot was declared drained"
        rank.assert_nothing_written()


async def test_a_cancel_waits_for_a_scatter_under_way_and_keeps_back_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    begun, go_on = asyncio.Event(), asyncio.Event()
    scattered: list[list[int]] = []
    async with running_rank() as rank:

        def slow_scatter(block_ids: list[int], *_: object) -> None:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(20.0)
            scattered.append(block_ids)

        monkeypatch.setattr(rank.storage, "start_scatter", slow_scatter)
        connection = await rank.connect()
        rank.post(op_id=1)
        await rank.reply(ReceivePosted)
        await connection.send(TAG, rank.gathered())
        await begun.wait()
        rank.post(op_id=2, slot=1)
        await rank.reply(ReceivePosted)
        await connection.send(TAG, rank.gathered())  # its scatter waits for the first
        for op_id in (1, 2):
            rank.receiver.handle(CancelReceive(op_id, 5.0))
        for _ in range(5):
            await asyncio.sleep(0)
        assert rank.num_unread_replies == 0, "a cancel was answered while a scatter was under way"
        go_on.set()
        answered = {(await rank.reply(KVMessage)).op_id for _ in range(2)}
        assert answered <= {1, 2}
        await rank.receiver.close()
        assert len(scattered) == 1


async def test_a_cancel_of_what_is_done_says_that_nothing_comes() -> None:
    async with running_rank() as rank:
        connection = await rank.connect()
        rank.post()
        await rank.reply(ReceivePosted)
        await connection.send(TAG, rank.gathered())
        await rank.reply(ReceiveDone)
        rank.receiver.handle(CancelReceive(1, 5.0))
        assert (await rank.reply(CancelDone)).outcome == "drained"
