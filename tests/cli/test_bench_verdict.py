"""What a run, several, or a search come to as an exit status, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cli.bench_verdict import verdict_of_runs, verdict_of_search
from loadtest.rate_search import Ending, RateSearch
from loadtest.record import RequestRecord, Run
from tests.loadtest.sample_runs import EMPTY, INTERRUPTED_RUN, request, run_of

GOOD, BAD = request(0.0, (0.1,)), request(0.0, outcome="Unavailable", ended_s=0.1)


def run_with_failures(num_failed: int, num_all: int, case: str = "") -> Run:
    records: list[RequestRecord] = [BAD] * num_failed + [GOOD] * (num_all - num_failed)
    return run_of(*records, case=case)


@pytest.mark.parametrize(("num_failed", "status"), [(0, 0), (1, 0), (2, 1), (100, 1)])
def test_one_request_in_a_hundred_may_fail(num_failed: int, status: int) -> None:
    assert verdict_of_runs([run_with_failures(num_failed, 100)]).status == status


def test_what_failed_is_said_in_a_line_for_each_run() -> None:
    runs = [run_with_failures(0, 9, "a"), run_with_failures(3, 9, "b"), run_with_failures(9, 9, "c")]
    verdict = verdict_of_runs(runs, "d: Unavailable: gone")
    assert verdict.status == 1
    assert verdict.complaints == (
        "b: 3 of 9 measured requests failed, most with Unavailable",
        "c: 9 of 9 measured requests failed, most with Unavailable",
        "d: Unavailable: gone",
    )


def test_a_run_without_a_request_is_no_success() -> None:
    verdict = verdict_of_runs([EMPTY])
    assert (verdict.status, verdict.complaints) == (1, ("no measured request ended",))


def test_interrupted_by_the_user_is_told_from_cut_short_by_a_failure() -> None:
    assert verdict_of_runs([INTERRUPTED_RUN]).status == 130
    cut_short = verdict_of_runs([run_of(GOOD, was_interrupted=True, failure="InternalError: gone")])
    assert (cut_short.status, cut_short.complaints) == (1, ("the run was cut short: InternalError: gone",))


@pytest.mark.parametrize(
    ("ending", "answer", "status"),
    [
        (Ending.RESOLVED, 4.0, 0),
        (Ending.LOW_RATE_MISSED, None, 1),
        (Ending.INTERRUPTED, 4.0, 130),
        (Ending.FAILED, 4.0, 1),
        (Ending.GENERATOR_LIMIT, 4.0, 1),
    ],
)
def test_a_search_is_a_success_if_the_servers_limit_was_found(
    ending: Ending, answer: float | None, status: int
) -> None:
    search = RateSearch(0.05, 0.9, (), answer, ending)
    assert verdict_of_search(search).status == status
    failed = verdict_of_search(replace(search, ending=Ending.FAILED, failure="Unavailable: gone"))
    assert failed.complaints == ("a run failed: Unavailable: gone",)
