"""The figures at the top of a page: few, and those that a reader looks for first. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.goodput import Goodput, Limits, goodput
from loadtest.measured import Measured
from loadtest.rate_search import RateSearch
from loadtest.report import wording
from loadtest.report.charts import NamedRun
from loadtest.statistics import Distribution, Summary

_MAX_GOODPUT_TILES = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure, with what it is above and what it needs below."""

    label: str
    value: str
    note: str


def tiles_of(
    runs: tuple[NamedRun, ...], summaries: Sequence[Summary], limits: Limits, search: RateSearch | None
) -> tuple[Tile, ...]:
    """The answer of a search, if there was one; then the figures of the one run, or of all together."""
    if len(runs) == 1:
        return (*_search_tiles(search, limits), *_run_tiles(runs[0].measured, summaries[0], limits))
    num_failed = sum(summary.num_failed for summary in summaries)
    num_counted = sum(run.measured.num_counted for run in runs)
    best = max(runs, key=lambda run: _headline(run.measured, limits).requests_per_s or 0.0)
    result = _headline(best.measured, limits)
    return (
        *_search_tiles(search, limits),
        Tile(
            "best goodput",
            wording.rate(result.requests_per_s),
            f"requests that met {wording.limit(result.ttft_s, result.itl_s)}, at {best.name}",
        ),
        Tile("runs", str(len(runs)), f"{num_counted:,} measured requests"),
        Tile("failed", f"{num_failed:,}", "requests that ended with an error, of all runs"),
    )


def _search_tiles(search: RateSearch | None, limits: Limits) -> tuple[Tile, ...]:
    if search is None:
        return ()
    wanted = f"{wording.share(search.share)} of requests with {wording.limit(limits.ttft_s, search.itl_s)}"
    found = "none" if search.answer is None else f"{search.answer:.3g}/s"
    return (Tile("highest rate", found, f"{wanted}; {wording.ending(search)}"),)


def _run_tiles(measured: Measured, summary: Summary, limits: Limits) -> tuple[Tile, ...]:
    results = [goodput(measured, limits.ttft_s, itl_s) for itl_s in limits.itl_s[:_MAX_GOODPUT_TILES] or (None,)]
    return (
        *(
            Tile("goodput", wording.share(result.share), f"{wording.limit(result.ttft_s, result.itl_s)}, every gap")
            for result in results
        ),
        Tile("TTFT p99", wording.p99(summary.ttft), _middle(summary.ttft)),
        Tile("gap p99", wording.p99(summary.gap), _middle(summary.gap)),
        Tile("output tokens", wording.rate(summary.output_tokens_per_s), _requests_rates(summary)),
        Tile("requests", f"{measured.num_counted:,}", f"{summary.num_failed:,} failed"),
    )


def _headline(measured: Measured, limits: Limits) -> Goodput:
    return goodput(measured, limits.ttft_s, limits.itl_s[0] if limits.itl_s else None)


def _middle(values: Distribution | None) -> str:
    return "" if values is None else f"p50 {wording.time(values.p50_s)}, max {wording.time(values.max_s)}"


def _requests_rates(summary: Summary) -> str:
    finished = wording.number(summary.requests_per_s)
    return f"{finished} requests/s finished, {wording.number(summary.offered_rate)} offered"
