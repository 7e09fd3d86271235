"""The live table of `baton up`: one line for each worker, and the latest events."""

from __future__ import annotations

import time
from collections import deque

from baton.v1 import worker_pb2
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from cli.deployment import ManagedProcess
from cli.worker_cells import blocks_of, slots_of, state_of
from cli.worker_watch import follow_status

_NUM_EVENTS = 5
_LEGEND = "blocks: free/cached/held   slots: free/used/quarantined"
_COLUMNS: tuple[tuple[str, JustifyMethod], ...] = (
    ("worker", "left"),
    ("state", "left"),
    ("TP", "right"),
    ("waiting", "right"),
    ("running", "right"),
    ("blocks", "right"),
    ("slots", "right"),
    ("restarts", "right"),
)


class StatusView:
    """A rich renderable that `watch` keeps up to date."""

    def __init__(self) -> None:
        self._statuses: dict[str, worker_pb2.WorkerStatus | None] = {}
        self._restarts: dict[str, int] = {}
        self._events: deque[str] = deque(maxlen=_NUM_EVENTS)

    def add_event(self, text: str) -> None:
        """Show a line of text with the time of day."""
        self._events.append(f"{time.strftime('%H:%M:%S')} {text}")

    def set_status(self, name: str, status: worker_pb2.WorkerStatus | None, num_restarts: int) -> None:
        """A worker said how it is, or cannot be reached."""
        self._statuses[name] = status
        self._restarts[name] = num_restarts

    async def watch(self, worker: ManagedProcess) -> None:
        """Follow one worker's status, also across its restarts, until cancelled."""

        def on_status(status: worker_pb2.WorkerStatus | None) -> None:
            self.set_status(worker.name, status, worker.num_restarts)

        await follow_status(worker.address, on_status)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        yield Text(_LEGEND, style="dim")
        yield from map(Text, self._events)

    def _table(self) -> Table:
        """Fits into 80 columns; where there are fewer, cells are folded: nothing is cut."""
        table = Table(box=None, padding=(0, 1, 0, 0))
        for heading, justify in _COLUMNS:
            table.add_column(heading, justify=justify, overflow="fold")
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
