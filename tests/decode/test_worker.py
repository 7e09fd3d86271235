"""The worker as a whole: status, draining, counters of the ranks, and its settings."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from baton.v1 import worker_pb2

from common.config import load_config
from common.errors import InvalidArgument, Unavailable
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import StartRank
from services.decode.config import DecodeConfig
from tests.decode.fake_group import FakeGroup
from tests.decode.front import LAYOUT, PATIENCE_S, Front, Prefill, Router, make_model, running_front, ship


async def test_status_tells_what_is_held_where() -> None:
    async with running_front(num_slots=3, num_blocks=16) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        status = front.worker.status()
        assert status.role == worker_pb2.WORKER_ROLE_DECODE
        assert (status.model, status.model_digest) == ("tiny", b"model")
        assert status.state == worker_pb2.WORKER_STATE_READY
        assert (status.num_open, status.num_waiting, status.num_running) == (1, 0, 0)
        assert (status.num_blocks_free, status.num_blocks_held) == (13, 3)
        assert (status.num_slots_free, status.num_slots_in_use) == (2, 1)
        assert list(status.rank_pids) == front.group.pids
        assert status.counters["sequences_opened"] == 1
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_draining_refuses_what_is_new_and_waits_for_what_is_under_way() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        front.worker.drain()
        assert front.worker.status().state == worker_pb2.WORKER_STATE_DRAINING
        with pytest.raises(Unavailable, match="draining"):
            router.open(2)
        idle = asyncio.create_task(front.worker.wait_idle(5.0))
        await ship(front, prefill, 0, 0, 3)
        assert not idle.done()
        prefill.finish(3)
        await prefill.receive("joined")
        assert await router.end_of(1) == "FINISHED"
        assert await idle
        await router.leave()


async def test_counters_of_the_ranks_go_on_when_the_ranks_start_from_zero() -> None:
    async with running_front() as front:
        front.group.stale_messages = 3
        await front.worker.refresh()
        front.group.stale_messages = 5
        await front.worker.refresh()
        front.group.lose("died")
        front.worker.on_lost("died")
        await front.worker.refresh()
        front.group = type(front.group)()
        front.group.stale_messages = 1
        front.worker.on_ready(front.group)
        await front.worker.refresh()
        assert front.worker.counters.snapshot()["stale_messages"] == 6


async def test_ranks_that_hang_are_lost_and_replaced() -> None:
    groups: asyncio.Queue[FakeGroup] = asyncio.Queue()

    async def start_ranks(_: str, specs: Sequence[StartRank], __: float) -> RankGroup:
        group = FakeGroup(len(specs))
        groups.put_nowait(group)
        return group

    front = Front(start_ranks=start_ranks, step_timeout_s=0.05)
    running = asyncio.create_task(front.worker.run())
    front.group = await groups.get()
    await front.until(lambda: front.worker.is_ready)
    front.group.hangs = True
    router = await Router(front).subscribed()
    for sequence_id, num_blocks in ((1, 3), (2, 2)):
        prefill = Prefill(front, router.open(sequence_id, num_tokens=4 * num_blocks))
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, num_blocks)
    prefill.finish(2)
    await prefill.receive("joined")
    assert [await router.end_of(sequence_id) for sequence_id in (1, 2)] == ["LOST", "LOST"]
    assert "hang" in str(front.group.lost_reason)
    front.group = await groups.get()
    await front.until(lambda: front.worker.is_ready)
    prefill = Prefill(front, router.open(3, num_tokens=4))
    await prefill.receive("accepted")
    await ship(front, prefill, 0, 0, 1)
    prefill.finish(1)
    assert await router.end_of(3) == "FINISHED"
    await front.until_free()
    await router.leave()
    running.cancel()
    await asyncio.wait({running})


async def test_a_worker_that_stops_as_its_ranks_are_lost_stops() -> None:
    group: asyncio.Future[FakeGroup] = asyncio.get_running_loop().create_future()

    async def start_ranks(_: str, specs: Sequence[StartRank], __: float) -> RankGroup:
        group.set_result(FakeGroup(len(specs)))
        return group.result()

    front = Front(start_ranks=start_ranks)
    running = asyncio.create_task(front.worker.run())
    ranks = await group
    await front.until(lambda: front.worker.is_ready)
    await asyncio.sleep(0)  # the engine takes its place
    ranks.lose("rank 0 died")
    running.cancel()  # in the same moment
    done, _ = await asyncio.wait({running}, timeout=PATIENCE_S)
    assert done


async def test_memory_for_blocks_may_be_given_in_bytes() -> None:
    block_bytes = LAYOUT.block_bytes(LAYOUT.num_kv_heads)
    assert Front(kv_bytes=5 * block_bytes + 1).worker.num_blocks == 5
    assert Front(tp_size=2, kv_bytes=5 * block_bytes).worker.num_blocks == 10
    with pytest.raises(InvalidArgument, match="kv_bytes"):
        Front(kv_bytes=block_bytes - 1)


def test_a_slot_that_holds_no_layer_of_a_block_is_refused_at_the_start() -> None:
    config = DecodeConfig.model_validate({"model": Path("unused"), "slot_bytes": 1 << 16})
    fits, too_large = (dataclasses.replace(LAYOUT, block_size=size) for size in (256, 512))
    assert too_large.layer_block_bytes(2) == 1 << 16  # and a header
    config.check_slots(dataclasses.replace(make_model(), layout=fits))
    with pytest.raises(InvalidArgument, match="slot_bytes = 65536"):
        config.check_slots(dataclasses.replace(make_model(), layout=too_large))


async def test_ranks_capture_steps_with_chunks_only_where_they_are_the_rule() -> None:
    assert [start.captured_chunk_tokens for start in Front(tp_size=2).worker._start_messages()] == [0, 0]
    worker = Front(tp_size=2, capture_chunks=True, chunk_tokens=192).worker
    assert [start.captured_chunk_tokens for start in worker._start_messages()] == [192, 192]


def test_settings_come_from_flags_and_environment() -> None:
    config = load_config(DecodeConfig, ["--model", "m", "--num-slots", "7"], {"BATON_DECODE_TP_SIZE": "2"})
    assert (config.model, config.num_slots, config.tp_size) == (Path("m"), 7, 2)
    with pytest.raises(InvalidArgument, match="multiple of 64"):
        load_config(DecodeConfig, ["--model", "m", "--slot-bytes", "5000"], {})
