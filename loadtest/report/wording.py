"""How figures are written, the same in a terminal and on a page. Pure."""

from __future__ import annotations

import math

from loadtest.goodput import Goodput, Limits, Variant
from loadtest.rate_search import RateSearch
from loadtest.record import Run
from loadtest.statistics import Distribution, Summary

NOTHING = "–"

VARIANTS = {
    Variant.EVERY_GAP: "every gap",
    Variant.P99_GAP: "p99 gap of the request",
    Variant.MEAN_TPOT: "mean TPOT of the request",
}


def time(value_s: float | None) -> str:
    """Three significant digits in the unit that suits: `850 µs`, `12.3 ms`, `1.50 s`."""
    if value_s is None:
        return NOTHING
    size = abs(value_s)
    if size >= 0.9995:
        return f"{_three_digits(value_s)} s"
    if size >= 0.0009995:
        return f"{_three_digits(value_s * 1e3)} ms"
    return f"{_three_digits(value_s * 1e6)} µs" if value_s else "0 s"


def short_time(value_s: float) -> str:
    """As given, without zeros at the end, for limits and axes: `50 ms`, `1.5 s`."""
    if value_s == 0 or abs(value_s) >= 1:
        return f"{value_s:,.6g} s"
    return f"{value_s * 1e3:.6g} ms" if abs(value_s) >= 0.001 else f"{value_s * 1e6:.6g} µs"


def share(value: float | None) -> str:
    """One decimal; never `100.0 %` or `0.0 %` of what is not quite all or nothing."""
    if value is None:
        return NOTHING
    if 0.9995 <= value < 1:
        return ">99.9 %"
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{value * 100:.1f} %"


def short_share(value: float) -> str:
    """Without zeros at the end, for axes: `25 %`, `0.001 %`."""
    return f"{f'{value * 100:.6f}'.rstrip('0').rstrip('.')} %"


def number(value: float | None) -> str:
    """Three significant digits, whole above 100, thousands apart."""
    return NOTHING if value is None else _three_digits(value)


def rate(value: float | None) -> str:
    """So many in a second."""
    return NOTHING if value is None else f"{_three_digits(value)}/s"


def limit(ttft_s: float | None, itl_s: float | None) -> str:
    """`TTFT ≤ 500 ms, gaps ≤ 50 ms`."""
    parts = [] if ttft_s is None else [f"TTFT ≤ {short_time(ttft_s)}"]
    parts += [] if itl_s is None else [f"gaps ≤ {short_time(itl_s)}"]
    return ", ".join(parts) or "no limits"


def gap_limit(itl_s: float | None) -> str:
    """`≤ 50 ms`."""
    return "any" if itl_s is None else f"≤ {short_time(itl_s)}"


def ttft_limit(ttft_s: float | None) -> str:
    """`TTFT ≤ 500 ms`."""
    return "any TTFT" if ttft_s is None else f"TTFT ≤ {short_time(ttft_s)}"


def limits(given: Limits) -> str:
    """All limits in one line."""
    gaps = " / ".join(short_time(itl_s) for itl_s in given.itl_s)
    ttft = "no limit on TTFT" if given.ttft_s is None else f"TTFT ≤ {short_time(given.ttft_s)}"
    return f"{ttft}, {f'gaps ≤ {gaps}' if gaps else 'no limit on gaps'}"


def met(result: Goodput) -> str:
    """`940 of 1,000`."""
    return f"{result.num_met:,} of {result.num_counted:,}"


def latencies(summary: Summary) -> tuple[tuple[str, str, Distribution | None], ...]:
    """Name, meaning and figures of each latency, in the order of a table."""
    return (
        ("TTFT", "due to first token", summary.ttft),
        ("TPOT", "mean time of a token after the first message, of each request", summary.tpot),
        ("gap", "between messages with tokens, every one of all requests", summary.gap),
        ("end to end", "due to last token", summary.end_to_end),
        ("sent − due", "how late the generator itself was", summary.scheduling_error),
    )


def p50(values: Distribution | None) -> str:
    """The median."""
    return NOTHING if values is None else time(values.p50_s)


def p99(values: Distribution | None) -> str:
    """The 99th percentile."""
    return NOTHING if values is None else time(values.p99_s)


def order_statistics(values: Distribution | None) -> tuple[str, ...]:
    """Number, mean, p50, p90, p99, maximum."""
    if values is None:
        return ("0",) + (NOTHING,) * 5
    times_s = (values.mean_s, values.p50_s, values.p90_s, values.p99_s, values.max_s)
    return (f"{values.num_values:,}", *(time(value_s) for value_s in times_s))


def requests(summary: Summary) -> str:
    """How the requests of a run ended."""
    ends = [f"{summary.num_ok:,} ok", f"{summary.num_failed:,} failed"]
    ends += [f"{summary.num_interrupted:,} interrupted"] if summary.num_interrupted else []
    ends += [f"{summary.num_warmup:,} warm-up, not measured"] if summary.num_warmup else []
    return ", ".join(ends)


def load(summary: Summary) -> tuple[tuple[str, str], ...]:
    """How much was asked of the server and how much it did, as name and value."""
    return (
        ("requests", requests(summary)),
        ("measured window", time(summary.window_s)),
        ("requests offered", rate(summary.offered_rate)),
        ("requests finished", rate(summary.requests_per_s)),
        ("input tokens", rate(summary.input_tokens_per_s)),
        ("output tokens", rate(summary.output_tokens_per_s)),
        ("tokens a message", number(summary.tokens_per_message)),
        ("prompt tokens cached", share(summary.cached_share)),
    )


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """What was run, where and when, as name and value."""
    info = run.info
    case = (("case", info.case),) if info.case else ()
    return (
        *case,
        ("model", info.model),
        ("target", f"{info.target} ({info.kind})"),
        ("workload", info.workload),
        ("scaling", "; ".join(info.scaling) or "none"),
        ("seed", str(info.seed)),
        ("machine", info.machine),
        ("started", info.started_at),
        ("duration", f"{time(info.duration_s)}{_cut_short(run)}"),
        ("generator", f"{info.num_processes} {'process' if info.num_processes == 1 else 'processes'}"),
        ("command", info.command),
    )


def ending(search: RateSearch) -> str:
    """Why a search stopped, and of what if something failed."""
    return f"{search.ending}: {search.failure}" if search.failure else str(search.ending)


def _cut_short(run: Run) -> str:
    if run.info.failure:
        return f", cut short: {run.info.failure}"
    return ", interrupted" if run.info.was_interrupted else ""


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    num_decimals = 2 - math.floor(math.log10(abs(rounded)) + 1e-9)
    return f"{rounded if num_decimals > 0 else value:,.{min(max(num_decimals, 0), 6)}f}"
