"""Samples add up what the workers of each pool say; a worker that is gone counts as empty."""

from __future__ import annotations

import asyncio

from baton.v1 import worker_pb2

from loadtest.clock import MonotonicClock
from loadtest.pool_sampler import sample_pools, summed
from loadtest.record import PoolSample
from tests.loadtest.fake_inference import FakeInference, serving

_PREFILL, _DECODE = worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE


def test_pools_are_summed_apart() -> None:
    statuses = [
        worker_pb2.WorkerStatus(role=_PREFILL, num_waiting=1, num_running=2),
        worker_pb2.WorkerStatus(role=_PREFILL, num_waiting=10, num_running=20),
        worker_pb2.WorkerStatus(role=_DECODE, num_waiting=100, num_running=200),
        worker_pb2.WorkerStatus(num_waiting=7),
    ]
    assert summed(statuses, 1.5) == PoolSample(1.5, 11, 22, 100, 200)
    assert summed([], 0.0) == PoolSample(0.0, 0, 0, 0, 0)


async def test_a_worker_that_goes_away_counts_as_empty_from_then_on() -> None:
    clock = MonotonicClock()
    samples: asyncio.Queue[PoolSample] = asyncio.Queue()
    async with serving(FakeInference()) as fake, asyncio.TaskGroup() as tasks:
        start_s = clock.now_s()
        sampling = tasks.create_task(sample_pools([fake.address], clock, start_s, samples.put_nowait))
        async with asyncio.timeout(20):
            while (await samples.get()).num_waiting_prefill != 5:
                pass
            assert fake.server is not None
            await fake.server.stop(0.0)
            while (last := await samples.get()).num_waiting_prefill:
                pass
        sampling.cancel()
    assert last.at_s > 0.0
