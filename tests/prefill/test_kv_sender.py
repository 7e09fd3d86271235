"""A rank's sender over the in-process transport: what arrives was in the blocks, and no slot is free too early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TypeVar, cast

import pytest
import torch

from common.errors import DigestMismatch
from common.kvcache.storage import KVStorage
from common.transport.faults import Fault, FaultScript, MessageInfo, no_faults
from common.transport.inproc import InprocEndpoint, InprocNetwork
from common.worker.rank_messages import (
    ConnectDone,
    ConnectPeer,
    GetTransportStats,
    RankKVMessage,
    SendDone,
    SendLeg,
    SlotDrained,
    StartRank,
    TransportStatsReply,
)
from common.worker.rank_process import KVContext
from common.worker.rank_runtime import RankRuntime
from common.worker.step_marks import StepMarks
from services.prefill.kv_sender import KVSender

NUM_HEADS = 4
SLOT_BYTES = 1 << 15
DECODE = "inproc://decode"
TAG = 0xBA70
SECRET = bytes(range(16))

ReplyT = TypeVar("ReplyT", bound=RankKVMessage)


def make_storage(seed: int | None = None) -> KVStorage:
    """Two layers, eight blocks of four tokens, four heads of eight."""
    storage = KVStorage(2, 8, NUM_HEADS, 4, 8, torch.float32, torch.device("cpu"))
    if seed is not None:
        storage.kv.copy_(torch.randn(storage.kv.shape, generator=torch.Generator().manual_seed(seed)))
    return storage


@dataclass
class Rank:
    """A sender, the decode rank's endpoint, and the replies."""

    sender: KVSender
    storage: KVStorage
    network: InprocNetwork
    decode: InprocEndpoint
    slots: torch.Tensor  # uint8 [2, SLOT_BYTES]
    marks: StepMarks
    replies: asyncio.Queue[RankKVMessage] = field(default_factory=asyncio.Queue)

    async def reply(self, kind: type[ReplyT]) -> ReplyT:
        async with asyncio.timeout(20):
            message = await self.replies.get()
        assert isinstance(message, kind)
        return message

    async def connect(self) -> None:
        self.sender.handle(ConnectPeer(1, DECODE, SECRET, 20.0))
        assert (await self.reply(ConnectDone)).error_kind == ""

    def leg(
        self,
        *,
        block_ids: tuple[int, ...] = (5, 1),
        op_id: int = 7,
        offset: int = 0,
        timeout_s: float = 5.0,
        layers: range = range(2),
        step_id: int = -1,
    ) -> SendLeg:
        """Heads 1 and 2 of some blocks."""
        num_bytes = self.storage.leg_bytes(len(block_ids), 2, layers)
        return SendLeg(
            op_id,
            DECODE,
            SECRET,
            1,
            offset,
            num_bytes,
            TAG,
            list(block_ids),
            1,
            2,
            layers.start,
            len(layers),
            step_id,
            timeout_s,
        )


@asynccontextmanager
async def running(faults: FaultScript = no_faults, corrupt_every: int = 0) -> AsyncIterator[Rank]:
    network = InprocNetwork(faults)
    endpoint, decode = network.open("inproc://prefill", "prefill"), network.open(DECODE, "decode")
    marks = StepMarks(torch.device("cpu"))
    storage, slots = make_storage(seed=1), torch.zeros((2, SLOT_BYTES), dtype=torch.uint8)
    replies: asyncio.Queue[RankKVMessage] = asyncio.Queue()
    start = StartRank(
        rank=0, tp_size=1, group_address="", model_dir="", device="cpu", dtype="float32", num_blocks=8, block_size=4,
        max_rows=1, max_step_tokens=8, num_slots=2, slot_bytes=SLOT_BYTES, transport_url="inproc://",
        transport_progress="event", peer_name="prefill", corrupt_every=corrupt_every,
    )  # fmt: skip
    runtime = cast(RankRuntime, SimpleNamespace(storage=storage, marks=marks))
    sender = KVSender(KVContext(endpoint, runtime, slots, start, replies.put_nowait))
    try:
        yield Rank(sender, storage, network, decode, slots, marks, replies)
    finally:
        await sender.close()
        await endpoint.close()
        await decode.close()


async def receive(rank: Rank, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes]"""
    connection = await rank.decode.wait_for_peer("prefill", 20.0, SECRET)
    buffer = torch.zeros(num_bytes, dtype=torch.uint8)
    posted = connection.post_receive(TAG, buffer)
    async with asyncio.timeout(20):
        await posted.wait()
    return buffer


async def test_leg_arrives_and_its_slot_is_free() -> None:
    async with running() as rank:
        await rank.connect()
        leg = rank.leg(offset=128)
        receiving = asyncio.create_task(receive(rank, leg.num_bytes))
        await asyncio.sleep(0)
        rank.sender.handle(leg)
        done = await rank.reply(SendDone)
        assert (done.op_id, done.error_kind, done.slot_free) == (7, "", True)
        assert 0 < done.gather_ns <= done.send_ns
        target = make_storage()
        target.scatter([2, 3], 1, 2, await receiving, TAG)
        assert torch.equal(target.kv[:, [2, 3], :, 1:3], rank.storage.kv[:, [5, 1], :, 1:3])
        assert not target.kv[:, :, :, 0].any()
        assert not rank.slots[0].any()
        assert not rank.slots[1, :128].any()


async def test_layers_leave_when_their_step_has_stored_them() -> None:
    async with running() as rank:
        await rank.connect()
        leg = rank.leg(layers=range(1, 2), step_id=3)
        receiving = asyncio.create_task(receive(rank, leg.num_bytes))
        rank.sender.handle(leg)
        rank.marks.begin(3)
        rank.marks.stored()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not receiving.done(), "one layer is stored, the leg has the second"
        rank.storage.kv[1, 5] = 4.0
        rank.marks.stored()
        assert (await rank.reply(SendDone)).error_kind == ""
        target = make_storage()
        target.scatter([2, 3], 1, 2, await receiving, TAG, range(1, 2))
        assert torch.equal(target.kv[1, [2, 3], :, 1:3], rank.storage.kv[1, [5, 1], :, 1:3])
        assert not target.kv[0].any()


async def test_leg_whose_step_takes_too_long_is_given_up_and_its_slot_is_free() -> None:
    async with running() as rank:
        await rank.connect()
        rank.sender.handle(rank.leg(step_id=3, timeout_s=0.01))
        done = await rank.reply(SendDone)
        assert (done.error_kind, done.slot_free) == ("TransferTimeout", True)


async def test_connecting_is_idempotent_and_shared() -> None:
    async with running() as rank:
        for op_id in (1, 2, 3):
            rank.sender.handle(ConnectPeer(op_id, DECODE, SECRET, 20.0))
        replies = [await rank.reply(ConnectDone) for _ in range(3)]
        assert {reply.op_id for reply in replies} == {1, 2, 3}
        assert {(reply.lane, reply.error_kind) for reply in replies} == {("inproc", "")}
        rank.sender.handle(GetTransportStats(4))
        assert (await rank.reply(TransportStatsReply)).connections == 1


async def test_failed_connect_is_reported_to_all_and_tried_again() -> None:
    async with running() as rank:
        rank.network.leave(rank.decode)
        for op_id in (1, 2):
            rank.sender.handle(ConnectPeer(op_id, DECODE, SECRET, 20.0))
        assert [(await rank.reply(ConnectDone)).error_kind for _ in range(2)] == ["PeerLost"] * 2
        rank.decode = rank.network.open(DECODE, "decode")
        await rank.connect()


async def test_dead_connection_is_replaced() -> None:
    async with running() as rank:
        await rank.connect()
        first = await rank.decode.wait_for_peer("prefill", 20.0, SECRET)
        await first.close()
        rank.sender.handle(rank.leg())
        done = await rank.reply(SendDone)
        assert (done.error_kind, done.slot_free) == ("PeerLost", True)
        await rank.connect()
        second = await rank.decode.wait_for_peer("prefill", 20.0, SECRET)
        assert second is not first
        assert second.alive


async def test_leg_without_a_connection_fails_and_its_slot_is_free() -> None:
    async with running() as rank:
        rank.sender.handle(rank.leg())
        done = await rank.reply(SendDone)
        assert (done.error_kind, done.slot_free) == ("PeerLost", True)


async def test_send_that_is_too_slow_is_in_doubt_until_its_connection_is_closed() -> None:
    hold = asyncio.Event()

    def stall(message: MessageInfo) -> Fault | None:
        return Fault(hold=hold)

    async with running(stall) as rank:
        await rank.connect()
        rank.sender.handle(rank.leg(timeout_s=1.0))
        done = await rank.reply(SendDone)
        assert (done.error_kind, done.slot_free) == ("TransferTimeout", False)
        drained = await rank.reply(SlotDrained)
        assert drained.op_id == done.op_id
        rank.sender.handle(GetTransportStats(9))
        assert (await rank.reply(TransportStatsReply)).connections == 0
        await rank.connect()


async def test_connection_lost_in_the_middle_is_in_doubt_until_drained() -> None:
    def lose(message: MessageInfo) -> Fault | None:
        return Fault(lose_connection=True)

    async with running(lose) as rank:
        await rank.connect()
        leg = rank.leg()
        receiving = asyncio.create_task(receive(rank, leg.num_bytes))
        await asyncio.sleep(0)
        rank.sender.handle(leg)
        done = await rank.reply(SendDone)
        assert (done.error_kind, done.slot_free) == ("PeerLost", False)
        await rank.reply(SlotDrained)
        await asyncio.gather(receiving, return_exceptions=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot": 2},
        {"slot": -1},
        {"offset": SLOT_BYTES - 64},
        {"num_bytes": 100},
        {"block_ids": [8]},
        {"first_local_head": 3},
        {"first_layer": 1},
        {"num_layers": 1},
    ],
)
async def test_leg_that_does_not_fit_is_refused_and_sends_nothing(wrong: dict[str, object]) -> None:
    async with running() as rank:
        await rank.connect()
        values = {name: getattr(rank.leg(), name) for name in SendLeg.__struct_fields__}
        rank.sender.handle(SendLeg(**(values | wrong)))
        done = await rank.reply(SendDone)
        assert (done.error_kind, done.slot_free) == ("InternalError", True)
        rank.sender.handle(GetTransportStats(9))
        assert (await rank.reply(TransportStatsReply)).messages_sent == 0


async def test_a_failure_that_nobody_foresaw_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object) -> None:
        raise RuntimeError("the library's own")

    async with running() as rank:
        monkeypatch.setattr(InprocEndpoint, "connect", connect)
        rank.sender.handle(ConnectPeer(1, DECODE, SECRET, 20.0))
        done = await rank.reply(ConnectDone)
        assert (done.error_kind, done.detail) == ("InternalError", "RuntimeError: the library's own")


async def test_every_nth_leg_is_corrupted_after_its_digest() -> None:
    async with running(corrupt_every=2) as rank:
        await rank.connect()
        for is_bad in (False, True, False):
            leg = rank.leg()
            receiving = asyncio.create_task(receive(rank, leg.num_bytes))
            await asyncio.sleep(0)
            rank.sender.handle(leg)
            assert (await rank.reply(SendDone)).error_kind == ""
            arrived = await receiving
            if is_bad:
                with pytest.raises(DigestMismatch):
                    make_storage().scatter([2, 3], 1, 2, arrived, TAG)
            else:
                make_storage().scatter([2, 3], 1, 2, arrived, TAG)


async def test_closing_ends_what_is_under_way() -> None:
    hold = asyncio.Event()

    def stall(message: MessageInfo) -> Fault | None:
        return Fault(hold=hold)

    async with running(stall) as rank:
        await rank.connect()
        rank.sender.handle(rank.leg(timeout_s=60.0))
        await asyncio.sleep(0)
    assert rank.replies.empty()
