"""The worker as a whole: status, draining, counters of the ranks, and its settings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from baton.v1 import worker_pb2

from common.config import load_config
from common.errors import InvalidArgument, Unavailable
from services.decode.config import DecodeConfig
from tests.decode.front import LAYOUT, Front, Prefill, Router, running_front, ship


async def test_status_tells_what_is_held_where() -> None:
    async with running_front(num_slots=3, num_blocks=16) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        status = front.worker.status()
        assert status.role == worker_pb2.WORKER_ROLE_DECODE
        assert status.state == worker_pb2.WORKER_STATE_READY
        assert (status.num_waiting, status.num_running) == (1, 0)
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
        idle = asyncio.create_task(front.worker.engine.wait_idle())
        await ship(front, prefill, 0, 0, 3)
        assert not idle.done()
        prefill.finish(3)
        await prefill.receive("joined")
        assert await router.end_of(1) == "FINISHED"
        async with asyncio.timeout(5.0):
            await idle
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


async def test_memory_for_blocks_may_be_given_in_bytes() -> None:
    block_bytes = LAYOUT.block_bytes(LAYOUT.num_kv_heads)
    assert Front(kv_bytes=5 * block_bytes + 1).worker.num_blocks == 5
    assert Front(tp_size=2, kv_bytes=5 * block_bytes).worker.num_blocks == 10
    with pytest.raises(InvalidArgument, match="kv_bytes"):
        Front(kv_bytes=block_bytes - 1)


def test_settings_come_from_flags_and_environment() -> None:
    config = load_config(DecodeConfig, ["--model", "m", "--num-slots", "7"], {"BATON_DECODE_TP_SIZE": "2"})
    assert (config.model, config.num_slots, config.tp_size) == (Path("m"), 7, 2)
    with pytest.raises(InvalidArgument, match="multiple of 64"):
        load_config(DecodeConfig, ["--model", "m", "--slot-bytes", "5000"], {})
