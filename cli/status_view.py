"""The live table of `baton up`: one line for each worker, and the latest events."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import grpc
from baton.v1 import worker_pb2, worker_pb2_grpc
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from cli.deployment import ManagedProcess
from common.rpc.client import open_channel

_MAX_STATUS_BYTES = 4 << 20
_NUM_EVENTS = 5
_RETRY_S = 0.5


class StatusView:
    """A rich renderable that `watch` keeps up to date."""

    def __init__(self) -> None:
        self._statuses: dict[str, worker_pb2.WorkerStatus | None] = {}
        self._restarts: dict[str, int] = {}
        self._events: deque[str] = deque(maxlen=_NUM_EVENTS)

    def add_event(self, text: str) -> None:
        """Show a line of text with the time of day."""
        self._events.append(f"{time.strftime('%H:%M:%S')} {text}")

    async def watch(self, worker: ManagedProcess) -> None:
        """Follow one worker's status, also across its restarts, until cancelled."""
        async with open_channel(worker.address, _MAX_STATUS_BYTES) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            while True:
                self._restarts[worker.name] = worker.num_restarts
                try:
                    async for status in stub.WatchStatus(worker_pb2.WatchStatusRequest(min_interval_ms=250)):
                        self._statuses[worker.name] = status
                        self._restarts[worker.name] = worker.num_restarts
                except grpc.aio.AioRpcError:
                    self._statuses[worker.name] = None
                await asyncio.sleep(_RETRY_S)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        yield from self._events

    def _table(self) -> Table:
        table = Table()
        for heading in ("worker", "state", "TP", "waiting", "running"):
            table.add_column(heading)
        for heading in ("blocks free/cached/held", "slots free/used/quarantined", "restarts"):
            table.add_column(heading, justify="right")
        for name, status in sorted(self._statuses.items()):
            restarts = str(self._restarts.get(name, 0))
            if status is None:
                table.add_row(name, "unreachable", "", "", "", "", "", restarts)
                continue
            state = worker_pb2.WorkerState.Name(status.state).removeprefix("WORKER_STATE_").lower()
            blocks = f"{status.num_blocks_free}/{status.num_blocks_cached}/{status.num_blocks_held}"
            slots = f"{status.num_slots_free}/{status.num_slots_in_use}/{status.num_slots_quarantined}"
            table.add_row(
                name,
                state,
                str(status.tp_size),
                str(status.num_waiting),
                str(status.num_running),
                blocks,
                slots,
                restarts,
            )
        return table
