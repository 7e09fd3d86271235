"""The gRPC service that every worker serves beside its own: who it is, how loaded it is, and draining.

It asks a callable for the status and is told when that may have changed; it knows no queue and no block.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from baton.v1 import worker_pb2, worker_pb2_grpc

DEFAULT_MIN_INTERVAL_MS = 100
SERVICE_NAME = "baton.v1.Worker"


async def _nothing() -> None:
    return None


class StatusService(worker_pb2_grpc.WorkerServicer):
    """Builds a status when asked, and sends another to each watcher when `notify` was called and it differs.

    `build` makes a status. `drain` starts draining and returns at once. `refresh`, if given, is awaited before
    GetStatus builds one, for numbers that must be fetched; it must not raise. Watchers never wait for it: they are told
    of changes at once, whatever state the ranks are in.
    """

    def __init__(
        self,
        build: Callable[[], worker_pb2.WorkerStatus],
        drain: Callable[[], None],
        refresh: Callable[[], Awaitable[None]] = _nothing,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._build = build
        self._drain = drain
        self._refresh = refresh
        self._sleep = sleep
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def notify(self) -> None:
        """The status may have changed. Cheap: call it whenever something happened."""
        for changed in self._watchers:
            changed.set()

    def close(self) -> None:
        """End every watch: the worker's end."""
        self._closed = True
        self.notify()

    async def GetStatus(  # noqa: N802 - the name in the proto
        self,
        request: worker_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GetStatusRequest, worker_pb2.WorkerStatus],
    ) -> worker_pb2.WorkerStatus:
        await self._refresh()
        return self._build()

    async def WatchStatus(  # noqa: N802
        self,
        request: worker_pb2.WatchStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WatchStatusRequest, worker_pb2.WorkerStatus],
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        has_interval = request.HasField("min_interval_ms")
        interval_ms = request.min_interval_ms if has_interval else DEFAULT_MIN_INTERVAL_MS
        async for status in self.watch(interval_ms / 1000):
            yield status

    async def Drain(  # noqa: N802
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        self._drain()
        return worker_pb2.DrainResponse()

    async def watch(self, min_interval_s: float) -> AsyncIterator[worker_pb2.WorkerStatus]:
        """A status now, then one whenever it differs from the last, at least `min_interval_s` apart."""
        changed = asyncio.Event()
        changed.set()
        self._watchers.add(changed)
        last: worker_pb2.WorkerStatus | None = None
        try:
            while not self._closed:
                await changed.wait()
                changed.clear()
                status = self._build()
                if status != last:
                    last = status
                    yield status
                    await self._sleep(min_interval_s)
        finally:
            self._watchers.discard(changed)
