"""The progress bar of a load test. Redrawn seldom, and nothing but a reader of what the generator has seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cli.console import open_console
from loadtest.generator import Observed

_INTERVAL_S = 0.25


@asynccontextmanager
async def shown_progress(observed: Observed, title: str, duration_s: float | None) -> AsyncIterator[None]:
    """Show a bar on standard error for as long as the context lasts, if that is a terminal."""
    console = open_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        row = bar.add_task(title, total=None, counts="")
        drawing = asyncio.create_task(_draw(bar, row, observed, title, duration_s))
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)


async def _draw(bar: Progress, row: TaskID, observed: Observed, title: str, duration_s: float | None) -> None:
    while True:
        if observed.started_s is None:
            counts = f"{len(observed.warmup)} requests"
            bar.update(row, description=f"{title}: warm-up", counts=counts, refresh=True)
        else:
            completed, total = _completed(observed, duration_s)
            counts = f"{len(observed.records)} ended, {observed.num_failed} failed"
            bar.update(row, description=title, completed=completed, total=total, counts=counts, refresh=True)
        await asyncio.sleep(_INTERVAL_S)


def _completed(observed: Observed, duration_s: float | None) -> tuple[float, float | None]:
    if observed.num_planned is not None:
        return len(observed.records), observed.num_planned
    return max(0.0, time.monotonic() - (observed.started_s or 0.0)), duration_s
