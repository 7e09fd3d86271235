"""The charts of a page: what each shows of which runs. Pure; `drawing` lays them out, the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.goodput import Goodput, Limits, Variant, goodput, limit_needed_s
from loadtest.measured import Measured
from loadtest.record import Run
from loadtest.report import wording
from loadtest.report.curves import in_flight, pools, share_beyond, share_within
from loadtest.report.drawing import (
    Chart,
    Point,
    draw_against_rate,
    draw_distributions,
    draw_tails,
    draw_timeline,
    hues,
)

_PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True, eq=False)
class NamedRun:
    """A run with the name and the colour that it has in every chart."""

    name: str
    hue: int
    rate: float | None  # requests/s: asked for, or else what became due
    run: Run
    measured: Measured

    @property
    def case(self) -> str:
        """What was run, where several are compared."""
        return self.run.info.case


def ttft_chart(runs: Sequence[NamedRun], limits: Limits, max_points: int) -> Chart:
    """Cumulative distribution of the time to first token."""
    chart = Chart(
        "Time to first token",
        "Share of finished requests whose first token had come, from when due. Dots: p50, p90, p99.",
    )
    curves = [share_within(run.name, run.measured.ttft_s) for run in runs]
    limits_s = () if limits.ttft_s is None else (limits.ttft_s,)
    return draw_distributions(chart, curves, [run.hue for run in runs], limits_s, max_points, _PERCENTS)


def gap_chart(runs: Sequence[NamedRun], limits: Limits, max_points: int) -> Chart:
    """Cumulative distribution of every gap."""
    chart = Chart(
        "Gaps between messages",
        "Share of all gaps of finished requests that were at most so long. Dots: p50, p90, p99.",
    )
    curves = [share_within(run.name, run.measured.gaps_s) for run in runs]
    return draw_distributions(chart, curves, [run.hue for run in runs], limits.itl_s, max_points, _PERCENTS)


def gap_tail_chart(runs: Sequence[NamedRun], limits: Limits, max_points: int) -> Chart:
    """Share of gaps beyond a time: one stall in ten thousand gaps shows here, and it decides goodput."""
    chart = Chart(
        "Tail of the gaps", "Share of gaps that were longer: rare stalls, which goodput by every gap depends on."
    )
    curves = [share_beyond(run.name, run.measured.gaps_s) for run in runs]
    return draw_tails(chart, curves, [run.hue for run in runs], limits.itl_s, max_points)


def limit_chart(run: NamedRun, limits: Limits, max_points: int) -> Chart:
    """Goodput for any limit on gaps, by each of the three ways to judge."""
    ttft = wording.ttft_limit(limits.ttft_s)
    note = f"Share of requests that would meet a limit on gaps of so long, with {ttft}. Failed requests meet none."
    measured = run.measured
    curves = [
        share_within(name, limit_needed_s(measured, limits.ttft_s, variant), measured.num_counted)
        for variant, name in wording.VARIANTS.items()
    ]
    return draw_distributions(Chart("Goodput by limit", note), curves, hues(len(curves)), limits.itl_s, max_points)


def rate_chart(runs: Sequence[NamedRun], limits: Limits, share: float | None, answer: float | None) -> Chart:
    """Goodput against rate, judged by every gap: a line for each case and limit on gaps, a point for each run."""
    note = f"Share of requests with {wording.ttft_limit(limits.ttft_s)} and every gap within a limit."
    chart = Chart("Goodput against rate", note)
    lines = [
        (_line_name(case, itl_s), _points([run for run in runs if run.case == case], limits.ttft_s, itl_s))
        for case in dict.fromkeys(run.case for run in runs)
        for itl_s in limits.itl_s or (None,)
    ]
    return draw_against_rate(chart, lines, share, answer)


def timeline_chart(run: NamedRun, max_points: int, width: int) -> Chart:
    """Queues and batches of the target over time; if it does not tell, the requests in flight."""
    if run.run.samples:
        note = "What the target's workers had waiting and running, summed over workers."
        chart = Chart("Queues and batches", note, width=width)
        return draw_timeline(chart, pools(run.run.samples), max_points)
    note = "Requests that were sent and had not ended. The target did not tell its queues."
    chart = Chart("Requests in flight", note, width=width)
    records = [record for record in run.run.records if not record.is_warmup]
    return draw_timeline(chart, [in_flight("in flight", records)], max_points)


def _line_name(case: str, itl_s: float | None) -> str:
    limit = wording.limit(None, itl_s)
    return f"{case}, {limit}" if case else limit


def _points(runs: Sequence[NamedRun], ttft_s: float | None, itl_s: float | None) -> list[Point]:
    """One for each run that has a rate and a goodput, in order of rate."""
    points = []
    for run in runs:
        result = goodput(run.measured, ttft_s, itl_s, Variant.EVERY_GAP)
        if run.rate is not None and result.share is not None:
            points.append(Point(run.rate, result.share, _point_title(run.name, result)))
    return sorted(points, key=lambda point: point.x)


def _point_title(name: str, result: Goodput) -> str:
    limit = wording.limit(result.ttft_s, result.itl_s)
    return f"{name}: {wording.share(result.share)} ({wording.met(result)})\n{limit}, every gap"
