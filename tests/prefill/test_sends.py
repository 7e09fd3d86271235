"""Send slots under cancellation: none is lost, whichever moment the waiter goes away in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common import errors
from common.kvcache.grant import SlotHandle
from services.prefill.chunk_shapes import ChunkShape
from services.prefill.legs import DecodeRank, RankLeg
from services.prefill.metrics import PrefillMetrics
from services.prefill.sends import Sends
from tests.prefill.fakes import FakeRanks, Wire

LEGS = [RankLeg(rank, DecodeRank(f"decode-{rank}", b""), 0, 128, rank, 0, 1) for rank in range(2)]


@asynccontextmanager
async def running(num_slots: int = 1) -> AsyncIterator[tuple[Sends, FakeRanks]]:
    ranks = FakeRanks(Wire(), [1, 2])
    ranks.holds_sends = True
    sends = Sends(ranks, num_slots, PrefillMetrics(), lambda: None)
    task = asyncio.create_task(sends.run())
    await asyncio.sleep(0)
    try:
        yield sends, ranks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def start(sends: Sends, handle: SlotHandle, reads_done: list[int], failures: list[errors.BatonError]) -> None:
    sends.start(
        handle,
        LEGS,
        ChunkShape(0, 2, 0, 1),
        block_ids=[1, 2],
        step_id=-1,
        timeout_s=1.0,
        on_read_done=lambda: reads_done.append(1),
        on_sent=lambda _: None,
        on_failure=failures.append,
    )


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_waiter_that_is_cancelled_leaves_the_queue() -> None:
    async with running() as (sends, _):
        handle = await sends.slots.acquire()
        waiter = asyncio.create_task(sends.slots.acquire())
        await turn()
        assert sends.slots.num_waiting == 1
        waiter.cancel()
        await turn()
        assert sends.slots.num_waiting == 0
        sends.slots.release(handle)
        assert sends.slots.num_free == 1


@pytest.mark.parametrize("is_cancelled_first", [True, False])
async def test_slot_that_meets_a_cancelled_waiter_goes_to_the_next(is_cancelled_first: bool) -> None:
    async with running() as (sends, _):
        handle = await sends.slots.acquire()
        waiter, following = asyncio.create_task(sends.slots.acquire()), asyncio.create_task(sends.slots.acquire())
        await turn()
        # Both happen before the waiter's task can run.
        if is_cancelled_first:
            waiter.cancel()
            sends.slots.release(handle)
        else:
            sends.slots.release(handle)
            waiter.cancel()
        await turn()
        assert waiter.cancelled()
        sends.slots.release(await following)
        assert (sends.slots.num_free, sends.slots.num_waiting) == (1, 0)


async def test_blocks_are_read_until_every_leg_is_done() -> None:
    async with running() as (sends, ranks):
        reads_done, failures = list[int](), list[errors.BatonError]()
        start(sends, await sends.slots.acquire(), reads_done, failures)
        await turn()
        ranks.finish_send()
        await turn()
        assert (reads_done, sends.slots.num_in_use) == ([], 1)
        ranks.finish_send()
        await turn()
        assert (reads_done, failures, sends.slots.num_free) == ([1], [], 1)


async def test_one_failed_leg_fails_the_send_once() -> None:
    async with running() as (sends, ranks):
        reads_done, failures = list[int](), list[errors.BatonError]()
        start(sends, await sends.slots.acquire(), reads_done, failures)
        await turn()
        ranks.finish_send("PeerLost")
        ranks.finish_send("PeerLost")
        await turn()
        assert [type(failure) for failure in failures] == [errors.PeerLost]
        assert (reads_done, sends.slots.num_free) == ([1], 1)


async def test_lost_ranks_end_a_send() -> None:
    async with running() as (sends, ranks):
        reads_done, failures = list[int](), list[errors.BatonError]()
        start(sends, await sends.slots.acquire(), reads_done, failures)
        await turn()
        ranks.lose("rank 1 died")
        await turn()
        assert (reads_done, [str(failure) for failure in failures]) == ([1], ["rank 1 died"])


async def test_a_rank_that_does_not_say_whether_it_is_connected_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.prefill.sends.ANSWER_GRACE_S", 0.0)
    async with running() as (sends, ranks):
        ranks.holds_connects = True
        with pytest.raises(errors.TransferTimeout, match="rank 0 did not say"):
            await asyncio.wait_for(sends.connect(0, DecodeRank("decode-0", b""), 0.01), 5.0)
        ranks.finish_connects()


async def test_send_after_the_end_fails_at_once() -> None:
    async with running() as (sends, _):
        handle = await sends.slots.acquire()
    reads_done, failures = list[int](), list[errors.BatonError]()
    start(sends, handle, reads_done, failures)
    assert (reads_done, [type(failure) for failure in failures]) == ([1], [errors.Unavailable])


async def test_failure_is_told_once_if_ranks_are_lost_while_a_leg_is_in_doubt() -> None:
    async with running() as (sends, ranks):
        reads_done, failures = list[int](), list[errors.BatonError]()
        start(sends, await sends.slots.acquire(), reads_done, failures)
        await turn()
        ranks.finish_send("TransferTimeout", is_in_doubt=True)
        ranks.finish_send("TransferTimeout", is_in_doubt=True)
        await turn()
        ranks.lose("rank 0 died")
        await turn()
        assert [type(failure) for failure in failures] == [errors.TransferTimeout]
        assert reads_done == [1]
