"""Prints a run, or a search for a rate, as tables. What came from outside is shown without markup or control codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.goodput import Limits, goodputs
from loadtest.measured import Measured, measured_part
from loadtest.rate_search import Ending, Probe, RateSearch
from loadtest.record import Run
from loadtest.report import wording
from loadtest.statistics import Summary, summarize

_ROOMY_COLUMNS = 140  # of a terminal in which a column of explanations fits


def print_report(run: Run, limits: Limits, console: Console) -> None:
    """What was run, latencies, throughput, goodput for every limit, errors."""
    measured = measured_part(run)
    summary = summarize(measured)
    _print_facts("run", run, console)
    _print_warnings(summary.warnings, console)
    _print_latencies(summary, console)
    _print_throughput(summary, console)
    _print_goodput(measured, limits, console)
    _print_errors(summary, console)


def print_comparison(runs: Sequence[Run], limits: Limits, console: Console) -> None:
    """The figures that differ between runs of the same load, a line for each, judged by the first limit."""
    table = Table(title=f"comparison: {wording.limits(limits)}", title_justify="left")
    for heading in ("case", "met", "share", "TTFT p50", "TTFT p99", "gap p50", "gap p99", "output tokens/s"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for run in runs:
        measured = measured_part(run)
        summary, result = summarize(measured), goodputs(measured, limits)[0]
        table.add_row(
            _plain(run.info.case),
            wording.met(result),
            wording.share(result.share),
            wording.p50(summary.ttft),
            wording.p99(summary.ttft),
            wording.p50(summary.gap),
            wording.p99(summary.gap),
            wording.number(summary.output_tokens_per_s),
        )
    console.print(table)


def print_search(search: RateSearch, limits: Limits, console: Console) -> None:
    """Every rate that was tried, in rising order, and the answer."""
    if search.probes:
        _print_facts(f"the first of {len(search.probes)} runs", search.probes[0].run, console)
    wanted = f"{wording.share(search.share)} of requests with {wording.limit(limits.ttft_s, search.itl_s)}"
    table = Table(title=f"rate search: {wanted}", title_justify="left")
    for heading in ("requests/s", "met", "share", "TTFT p99", "gap p99", "output tokens/s", "verdict"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right")
    probes = [(probe, summarize(measured_part(probe.run))) for probe in search.probes]
    probes.sort(key=lambda entry: entry[0].rate)
    for probe, summary in probes:
        table.add_row(*_probe_cells(probe, summary, search))
    console.print(table)
    for probe, summary in probes:
        _print_warnings([f"{probe.rate:.3g} requests/s: {warning}" for warning in summary.warnings], console)
    if any(probe.is_close_call for probe in search.probes):
        console.print("≈ within two standard errors of the share asked for: another run could turn it over")
    answer = "no rate met the limits" if search.answer is None else f"highest rate: {search.answer:.3g} requests/s"
    console.print(_plain(f"{answer} ({wording.ending(search)})", style="bold"))


def _print_warnings(warnings: Iterable[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))


def _probe_cells(probe: Probe, summary: Summary, search: RateSearch) -> tuple[str, ...]:
    if probe.run.info.was_interrupted:
        verdict = "failed" if probe.run.info.failure else "interrupted"
    elif search.ending is Ending.GENERATOR_LIMIT and probe is search.probes[-1]:
        verdict = "generator"
    else:
        verdict = ("meets" if probe.is_met else "misses") + (" ≈" if probe.is_close_call else "")
    return (
        f"{probe.rate:.3g}",
        wording.met(probe.goodput),
        wording.share(probe.goodput.share),
        wording.p99(summary.ttft),
        wording.p99(summary.gap),
        wording.number(summary.output_tokens_per_s),
        verdict,
    )


def _print_facts(title: str, run: Run, console: Console) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in wording.facts(run):
        table.add_row(name, _plain(value))
    console.print(table)


def _print_latencies(summary: Summary, console: Console) -> None:
    has_room = console.width >= _ROOMY_COLUMNS
    table = _statistics_table("latency")
    if has_room:
        table.add_column("what it is")
    for name, meaning, values in wording.latencies(summary):
        table.add_row(name, *wording.order_statistics(values), *([meaning] if has_room else []))
    console.print(table)
    if summary.phases:
        phases = _statistics_table("the server's own account")
        for name, phase in summary.phases.items():
            phases.add_row(_plain(name.replace("_", " ")), *wording.order_statistics(phase))
        console.print(phases)


def _statistics_table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("values", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _print_throughput(summary: Summary, console: Console) -> None:
    table = Table(title="load and throughput", title_justify="left", show_header=False)
    for name, value in wording.load(summary):
        table.add_row(name, value)
    console.print(table)


def _print_goodput(measured: Measured, limits: Limits, console: Console) -> None:
    table = Table(title=f"goodput: {wording.ttft_limit(limits.ttft_s)} and gaps within a limit", title_justify="left")
    for heading in ("limit", "judged by", "met", "share", "requests/s"):
        table.add_column(heading, justify="left" if heading == "judged by" else "right")
    for index, result in enumerate(goodputs(measured, limits)):
        table.add_row(
            wording.gap_limit(result.itl_s),
            wording.VARIANTS[result.variant],
            wording.met(result),
            wording.share(result.share),
            wording.number(result.requests_per_s),
            style="bold" if index == 0 else None,
        )
    console.print(table)


def _print_errors(summary: Summary, console: Console) -> None:
    if not summary.errors:
        console.print("no errors")
        return
    table = Table(title="errors", title_justify="left")
    for heading in ("type", "requests", "the first of them"):
        table.add_column(heading, justify="right" if heading == "requests" else "left")
    for error in summary.errors:
        table.add_row(_plain(error.outcome), f"{error.num_requests:,}", _plain(error.example))
    console.print(table)


def _plain(text: str, style: str = "") -> Text:
    """No markup, and no control codes that would reach the terminal."""
    return Text("".join(char if char.isprintable() else " " for char in text), style=style)
