"""The screen of `baton top`: a line for each worker, and the router's latencies.

Draws what it was told; fetches nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from baton.v1 import worker_pb2
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from cli.link_speed import LinkSpeed, lane_of
from cli.scrape import Scrape, quantile
from cli.worker_cells import block_bar, blocks_of, bytes_per_s, latency, name_of, slots_of, state_of

_PERCENTILES = (0.5, 0.9, 0.99)
_TEXT_WIDTH, _MAX_BAR_CELLS = 88, 20
_LEGEND = "blocks: █ held ▒ cached · free; free/cached/held   slots: free/used/in doubt"
_COLUMNS: tuple[tuple[str, JustifyMethod], ...] = (
    ("worker", "left"),
    ("state", "left"),
    ("batch", "right"),
    ("wait", "right"),
    ("", "left"),
    ("blocks", "right"),
    ("slots", "right"),
    ("link", "right"),
    ("lane", "left"),
)
_LATENCIES = (
    ("time to first token", "baton_router_time_to_first_token_seconds"),
    ("inter-token latency", "baton_router_inter_token_seconds"),
    ("request", "baton_router_request_duration_seconds"),
)


class TopView:
    """A rich renderable of what was told last."""

    def __init__(self, addresses: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._statuses: dict[str, worker_pb2.WorkerStatus | None] = dict.fromkeys(addresses)
        self._links = {address: LinkSpeed() for address in addresses}
        self._router: tuple[Scrape, Scrape, float] | None = None
        self._router_error = ""

    def set_status(self, address: str, status: worker_pb2.WorkerStatus | None) -> None:
        """A worker said how it is, or cannot be reached."""
        self._statuses[address] = status
        if status is not None:
            self._links[address].add(status, self._clock())

    def set_router(self, before: Scrape, after: Scrape, interval_s: float) -> None:
        """Two looks at the router's metrics, so many seconds apart; 0: since it started."""
        self._router, self._router_error = (before, after, interval_s), ""

    def set_router_error(self, error: str) -> None:
        """Its metrics cannot be read."""
        self._router_error = error

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._statuses:
            yield self._workers(options.max_width)
            yield Text(_LEGEND, style="dim")
        if self._router_error:
            yield Text(f"router: {self._router_error}")
        elif self._router is not None:
            yield self._latencies(*self._router)

    def _workers(self, width: int) -> Table:
        """Fits into 80 columns; blocks are drawn as bars too where there are more, cells fold where there are fewer."""
        bar_cells = min(_MAX_BAR_CELLS, width - _TEXT_WIDTH)
        table = Table(box=None, padding=(0, 1, 0, 0))
        for heading, justify in _COLUMNS:
            table.add_column(heading, justify=justify, overflow="fold")
        now_s = self._clock()
        for address, status in self._statuses.items():
            if status is None:
                table.add_row(address, "unreachable")
                continue
            table.add_row(
                name_of(status),
                state_of(status),
                str(status.num_running),
                str(status.num_waiting),
                block_bar(status, bar_cells) if bar_cells > 0 else "",
                blocks_of(status),
                slots_of(status),
                bytes_per_s(self._links[address].bytes_per_s(now_s)),
                lane_of(status),
            )
        return table

    def _latencies(self, before: Scrape, after: Scrape, interval_s: float) -> Table:
        since = f"last {interval_s:.0f} s" if interval_s else "since the start"
        table = Table(title=f"router, {since}: {_rates(before, after, interval_s)}", title_justify="left")
        table.add_column("")
        for q in _PERCENTILES:
            table.add_column(f"p{q * 100:.0f}", justify="right")
        for title, name in _LATENCIES:
            table.add_row(title, *(latency(quantile(before, after, name, q)) for q in _PERCENTILES))
        return table


def _rates(before: Scrape, after: Scrape, interval_s: float) -> str:
    num_requests = after.total("baton_router_requests_total") - before.total("baton_router_requests_total")
    num_tokens = after.total("baton_router_output_tokens_total") - before.total("baton_router_output_tokens_total")
    if not interval_s:
        return f"{num_requests:.0f} requests, {num_tokens:.0f} tokens"
    return f"{num_requests / interval_s:.1f} requests/s, {num_tokens / interval_s:.0f} tokens/s"
