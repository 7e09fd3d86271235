"""The live table of `baton up`: one line for each worker, and the latest events."""

from __future__ import annotations

import time
from collections import deque

from baton.v1 import worker_pb2
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from cli.deployment import ManagedProcess
from cli.worker_cells import blocks_of, slots_of, state_of
from cli.worker_watch import follow_status

_NUM_EVENTS = 5


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

        def on_status(status: worker_pb2.WorkerStatus | None) -> None:
            self._statuses[worker.name] = status
            self._restarts[worker.name] = worker.num_restarts

        await follow_status(worker.address, on_status)

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
            table.add_row(
                name,
                state_of(status),
                str(status.tp_size),
                str(status.num_waiting),
                str(status.num_running),
                blocks_of(status),
                slots_of(status),
                restarts,
            )
        return table
