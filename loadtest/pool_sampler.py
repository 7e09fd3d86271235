"""Watches Baton's workers during a run and samples their queues and batches, for the timeline of the report.

Uses the status stream that every worker serves. A worker that cannot be reached counts as empty until it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import grpc
from baton.v1 import worker_pb2, worker_pb2_grpc

from common.errors import Unavailable
from common.rpc.client import decoded, open_channel
from common.rpc.status import error_from_rpc
from loadtest.clock import Clock
from loadtest.record import PoolSample

INTERVAL_S = 0.25
_RETRY_S = 0.5
_CHECK_S = 5.0
_MAX_STATUS_BYTES = 4 << 20


async def check_workers(addresses: Sequence[str]) -> None:
    """Fail if one of them does not answer as a worker: a wrong address would look like an idle pool."""
    for address in addresses:
        async with open_channel(address, _MAX_STATUS_BYTES) as channel:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
            try:
                await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=_CHECK_S)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"worker {address}: {error_from_rpc(error)}") from error


async def sample_pools(
    addresses: Sequence[str], clock: Clock, start_s: float, on_sample: Callable[[PoolSample], None]
) -> None:
    """Sample every INTERVAL_S from `start_s` of the clock on, until cancelled."""
    latest: dict[str, worker_pb2.WorkerStatus] = {}
    async with asyncio.TaskGroup() as tasks:
        for address in addresses:
            tasks.create_task(_watch(address, latest))
        at_s = start_s
        while True:
            await clock.sleep_until(at_s)
            on_sample(summed(latest.values(), at_s - start_s))
            at_s += INTERVAL_S


def summed(statuses: Iterable[worker_pb2.WorkerStatus], at_s: float) -> PoolSample:
    """One sample of all workers. Prompts wait in a prefill worker; a decode worker's wait for blocks or a row."""
    counts = {worker_pb2.WORKER_ROLE_PREFILL: [0, 0], worker_pb2.WORKER_ROLE_DECODE: [0, 0]}
    for status in statuses:
        if status.role in counts:
            counts[status.role][0] += status.num_waiting
            counts[status.role][1] += status.num_running
    prefill, decode = counts[worker_pb2.WORKER_ROLE_PREFILL], counts[worker_pb2.WORKER_ROLE_DECODE]
    return PoolSample(at_s, prefill[0], prefill[1], decode[0], decode[1])


async def _watch(address: str, latest: dict[str, worker_pb2.WorkerStatus]) -> None:
    interval_ms = round(INTERVAL_S * 1e3)
    async with open_channel(address, _MAX_STATUS_BYTES) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        while True:
            try:
                async for message in stub.WatchStatus(worker_pb2.WatchStatusRequest(min_interval_ms=interval_ms)):
                    latest[address] = decoded(message, address)
            except (grpc.aio.AioRpcError, Unavailable):
                latest.pop(address, None)
            await asyncio.sleep(_RETRY_S)
