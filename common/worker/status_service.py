"""The gRPC service that every worker serves beside its own: who it is, how loaded it is, that it runs, and draining.

It asks a callable for the status and is told when that may have changed; it knows no queue and no block.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import grpc
from baton.v1 import worker_pb2, worker_pb2_grpc

from common.errors import ResourceExhausted

DEFAULT_MIN_INTERVAL_MS = 100
BEAT_INTERVAL_S = 1.0  # watchers hear something at least so often
MAX_WATCHERS = 128  # each is written to ten times a second by the loop that serves requests; router processes are few
SERVICE_NAME = "baton.v1.Worker"


async def _nothing() -> None:
    return None


class _Snapshot:
    """A status as it was once, and its bytes, made once for all who watch."""

    def __init__(self, status: worker_pb2.WorkerStatus) -> None:
        self.status = status
        self.encoded: bytes = status.SerializeToString()


class _Watcher:
    """One stream, and why it should look again."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.called.set()
        self.is_due = True  # for a status, changed or not


class StatusService(worker_pb2_grpc.WorkerServicer):
    """Builds a status when asked, and sends another to each watcher when `notify` was called and it differs. While
    `run` runs, each watcher also gets one every second: from the loop that serves requests, so none when that stops.

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
        self._watchers: set[_Watcher] = set()
        self._closed = False
        self._max_interval_ms = 0  # no promise
        self._latest: _Snapshot | None = None
        self._may_differ = True  # from the latest

    def notify(self) -> None:
        """The status may have changed. Cheap: call it whenever something happened."""
        self._may_differ = True
        for watcher in self._watchers:
            watcher.called.set()

    async def run(self) -> None:
        """Give watchers their signs of life, until cancelled."""
        self._max_interval_ms = round(BEAT_INTERVAL_S * 1000)
        while True:
            for watcher in self._watchers:
                watcher.is_due = True
            self.notify()
            await self._sleep(BEAT_INTERVAL_S)

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

    async def WatchStatus(  # type: ignore[override] # noqa: N802 - serialized already: see common.rpc.calls
        self,
        request: worker_pb2.WatchStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WatchStatusRequest, worker_pb2.WorkerStatus],
    ) -> AsyncIterator[bytes]:
        has_interval = request.HasField("min_interval_ms")
        interval_ms = request.min_interval_ms if has_interval else DEFAULT_MIN_INTERVAL_MS
        async with contextlib.aclosing(self._snapshots(interval_ms / 1000)) as snapshots:
            async for snapshot in snapshots:
                yield snapshot.encoded

    async def Drain(  # noqa: N802
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        self._drain()
        return worker_pb2.DrainResponse()

    async def watch(self, min_interval_s: float) -> AsyncIterator[worker_pb2.WorkerStatus]:
        """A status now, then one whenever it differs from the last or is due, at least `min_interval_s` apart."""
        async with contextlib.aclosing(self._snapshots(min_interval_s)) as snapshots:
            async for snapshot in snapshots:
                yield snapshot.status

    async def _snapshots(self, min_interval_s: float) -> AsyncGenerator[_Snapshot, None]:
        if len(self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(f"{MAX_WATCHERS} streams watch this worker's status, which is all it serves")
        watcher = _Watcher()
        self._watchers.add(watcher)
        self._may_differ = True  # what has just come is told the state of now
        last: _Snapshot | None = None
        try:
            while not self._closed:
                await watcher.called.wait()
                watcher.called.clear()
                latest = self._look()
                if latest is not last or watcher.is_due:
                    last, watcher.is_due = latest, False
                    yield latest
                    await self._sleep(min_interval_s)
        finally:
            self._watchers.discard(watcher)

    def _look(self) -> _Snapshot:
        """The latest, or another if the status differs from it: built once, however many watch."""
        if self._latest is None or self._may_differ:
            self._may_differ = False
            status = self._build()
            status.max_interval_ms = self._max_interval_ms
            if self._latest is None or status != self._latest.status:
                self._latest = _Snapshot(status)
        return self._latest
