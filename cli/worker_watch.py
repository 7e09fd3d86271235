"""Following the status of a worker that runs, across its restarts. Knows no table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from baton.v1 import worker_pb2, worker_pb2_grpc

from common.errors import Unavailable
from common.rpc.client import decoded, open_channel

_MAX_STATUS_BYTES = 4 << 20
_RETRY_S = 0.5
OnStatus = Callable[[worker_pb2.WorkerStatus | None], None]


async def follow_status(address: str, on_status: OnStatus, min_interval_ms: int = 250) -> None:
    """Tell every status, and None whenever the worker is not to be reached, until cancelled."""
    request = worker_pb2.WatchStatusRequest(min_interval_ms=min_interval_ms)
    async with open_channel(address, _MAX_STATUS_BYTES) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        while True:
            try:
                async for message in stub.WatchStatus(request):
                    on_status(decoded(message, address))
            except (grpc.aio.AioRpcError, Unavailable):
                on_status(None)
            await asyncio.sleep(_RETRY_S)


async def get_status(address: str, timeout_s: float) -> worker_pb2.WorkerStatus | None:
    """One status; None if the worker is not to be reached in time."""
    async with open_channel(address, _MAX_STATUS_BYTES) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        try:
            return decoded(await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout_s), address)
        except (grpc.aio.AioRpcError, Unavailable):
            return None
