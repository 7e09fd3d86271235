"""Writes one page about one run, several, or a search for a rate. It stands alone: no script, no request of any kind.

What came from outside, model names, error texts, commands, reaches the page only through the template's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from common.errors import InvalidArgument
from loadtest.goodput import Goodput, Limits, goodputs
from loadtest.measured import Measured, measured_part
from loadtest.rate_search import RateSearch
from loadtest.record import Run
from loadtest.report import charts, drawing, wording
from loadtest.report.charts import NamedRun
from loadtest.report.drawing import Chart
from loadtest.report.tiles import tiles_of
from loadtest.statistics import ErrorCount, Summary, summarize

_MAX_POINTS = 400  # of one curve
_MAX_PAGE_POINTS = 40_000  # of all curves: with about twelve bytes a point, half a megabyte
_CURVES_PER_RUN = 10
_MIN_POINTS = 40
_OVERVIEW_HEADINGS = ("requests", "failed", "goodput", "TTFT p50", "TTFT p99", "gap p50", "gap p99", "output tokens/s")

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("loadtest.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, slots=True)
class GoodputRow:
    """One line of a table of goodput."""

    result: Goodput
    limit: str
    judged_by: str
    met: str
    share: str
    requests_per_s: str


@dataclass(frozen=True, slots=True)
class RunSection:
    """All that the page says of one run by itself."""

    name: str
    hue: int
    facts: tuple[tuple[str, str], ...]
    load: tuple[tuple[str, str], ...]
    latencies: tuple[tuple[str, str, tuple[str, ...]], ...]  # name, meaning, cells
    phases: tuple[tuple[str, str, tuple[str, ...]], ...]
    goodput: tuple[GoodputRow, ...]
    errors: tuple[ErrorCount, ...]
    warnings: tuple[str, ...]
    headline: str  # what goodput in the overview means
    overview: tuple[str, ...]
    charts: tuple[Chart, ...]


def write(runs: Sequence[Run], limits: Limits, path: Path) -> None:
    """Write the page of one run or several; a file that was there is replaced. Raises `InvalidArgument` for no run."""
    parts = [measured_part(run) for run in runs]
    named = _named([(part.offered_rate, run, part) for run, part in zip(runs, parts, strict=True)])
    path.write_text(_page(named, limits, None), encoding="utf-8", errors="replace")


def write_search(search: RateSearch, limits: Limits, path: Path) -> None:
    """Write the page of a search, every run of it, its own limit first; a file that was there is replaced."""
    named = _named([(probe.rate, probe.run, measured_part(probe.run)) for probe in search.probes])
    others = tuple(itl_s for itl_s in limits.itl_s if itl_s != search.itl_s)
    path.write_text(
        _page(named, Limits(limits.ttft_s, (search.itl_s, *others)), search), encoding="utf-8", errors="replace"
    )


def _named(runs: Sequence[tuple[float | None, Run, Measured]]) -> tuple[NamedRun, ...]:
    """Case by case as they first came, in order of rate, named after both, coloured in that order."""
    if not runs:
        raise InvalidArgument("runs", list(runs), "at least one run")
    cases = list(dict.fromkeys(run.info.case for _, run, _ in runs))
    in_order = sorted(
        runs, key=lambda entry: (cases.index(entry[1].info.case), math.inf if entry[0] is None else entry[0])
    )
    names: list[str] = []
    for index, (rate, run, _) in enumerate(in_order, 1):
        name = f"run {index}" if rate is None else f"{rate:.3g} requests/s"
        name = f"{run.info.case}, {name}" if run.info.case else name
        names.append(f"{name}, run {index}" if name in names else name)
    colours = drawing.hues(len(in_order))
    return tuple(NamedRun(name, hue, *entry) for name, hue, entry in zip(names, colours, in_order, strict=True))


def _page(runs: tuple[NamedRun, ...], limits: Limits, search: RateSearch | None) -> str:
    max_points = max(_MIN_POINTS, min(_MAX_POINTS, _MAX_PAGE_POINTS // (_CURVES_PER_RUN * len(runs))))
    summaries = [summarize(run.measured) for run in runs]
    shared = [
        charts.ttft_chart(runs, limits, max_points),
        charts.gap_chart(runs, limits, max_points),
        charts.gap_tail_chart(runs, limits, max_points),
    ]
    if len(runs) > 1:
        asked = (None, None) if search is None else (search.share, search.answer)
        shared.insert(0, charts.rate_chart(runs, limits, *asked))
    # Of a single run all charts are in one grid, where it would stand alone in the last row.
    width = drawing.WIDE if len(runs) == 1 else drawing.WIDTH
    sections = [_section(run, summary, limits, max_points, width) for run, summary in zip(runs, summaries, strict=True)]
    return _TEMPLATES.get_template("page.html.j2").render(
        info=runs[0].run.info,
        tiles=tiles_of(runs, summaries, limits, search),
        limits=wording.limits(limits),
        ttft_limit=wording.ttft_limit(limits.ttft_s),
        scaling=sorted({text for run in runs for text in run.run.info.scaling}),
        charts=tuple(shared),
        sections=sections,
        overview_headings=_OVERVIEW_HEADINGS,
        statistics=("values", "mean", "p50", "p90", "p99", "max"),
        area=drawing,
    )


def _section(run: NamedRun, summary: Summary, limits: Limits, max_points: int, timeline_width: int) -> RunSection:
    results = goodputs(run.measured, limits)
    return RunSection(
        name=run.name,
        hue=run.hue,
        facts=wording.facts(run.run),
        load=wording.load(summary),
        latencies=tuple(
            (name, meaning, wording.order_statistics(values)) for name, meaning, values in wording.latencies(summary)
        ),
        phases=tuple(
            (name.replace("_", " "), "", wording.order_statistics(phase)) for name, phase in summary.phases.items()
        ),
        goodput=tuple(_goodput_row(result) for result in results),
        errors=summary.errors,
        warnings=summary.warnings,
        headline=wording.limit(results[0].ttft_s, results[0].itl_s),
        overview=_overview(summary, results[0]),
        charts=(charts.limit_chart(run, limits, max_points), charts.timeline_chart(run, max_points, timeline_width)),
    )


def _goodput_row(result: Goodput) -> GoodputRow:
    return GoodputRow(
        result=result,
        limit=wording.gap_limit(result.itl_s),
        judged_by=wording.VARIANTS[result.variant],
        met=wording.met(result),
        share=wording.share(result.share),
        requests_per_s=wording.number(result.requests_per_s),
    )


def _overview(summary: Summary, headline: Goodput) -> tuple[str, ...]:
    return (
        f"{summary.num_ok + summary.num_failed:,}",
        f"{summary.num_failed:,}",
        wording.share(headline.share),
        wording.p50(summary.ttft),
        wording.p99(summary.ttft),
        wording.p50(summary.gap),
        wording.p99(summary.gap),
        wording.number(summary.output_tokens_per_s),
    )
