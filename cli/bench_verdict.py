"""The exit status of `baton bench`, and what it says on standard error. Pure: sees runs, prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.measured import measured_part
from loadtest.rate_search import Ending, RateSearch
from loadtest.record import Run
from loadtest.report import wording
from loadtest.statistics import has_many_failures, summarize

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Verdict:
    """`complaints` are lines."""

    status: int
    complaints: tuple[str, ...] = ()


def verdict_of_runs(runs: Sequence[Run], failure: str = "") -> Verdict:
    """1 if a run failed, or the one that should have come next, or many requests; 130 if the user stopped it."""
    complaints = [complaint for run in runs if (complaint := _complaint_of(run))]
    complaints += [failure] if failure else []
    if failure or any(run.info.failure for run in runs):
        return Verdict(1, tuple(complaints))
    if any(run.info.was_interrupted for run in runs):
        return Verdict(INTERRUPTED)
    return Verdict(1 if complaints else 0, tuple(complaints))


def verdict_of_search(search: RateSearch) -> Verdict:
    """0 if a rate was found. Failed requests are no failure here: they show that a rate is too high."""
    if search.ending is Ending.INTERRUPTED:
        return Verdict(INTERRUPTED)
    if search.ending in (Ending.FAILED, Ending.GENERATOR_LIMIT):
        return Verdict(1, (wording.ending(search),))
    return Verdict(0 if search.answer is not None else 1)


def _complaint_of(run: Run) -> str:
    case = f"{run.info.case}: " if run.info.case else ""
    if run.info.failure:
        return f"{case}the run was cut short: {run.info.failure}"
    summary = summarize(measured_part(run))
    num_counted = summary.num_ok + summary.num_failed
    if not num_counted:
        return f"{case}no measured request ended"
    if not has_many_failures(summary):
        return ""
    first = summary.errors[0]
    return f"{case}{summary.num_failed} of {num_counted} measured requests failed, most with {first.outcome}"
