"""The rate of a monotone server is found within few runs, and noise cannot make the answer senseless."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidArgument, Unavailable
from loadtest.goodput import Limits
from loadtest.rate_search import Bounds, Ending, RateSearch, find_rate, next_rate
from loadtest.record import RequestRecord, Run
from tests.loadtest.sample_runs import EMPTY, request, run_of

LIMITS = Limits(ttft_s=1.0, itl_s=(0.05,))
FAST, SLOW = request(0.0, (0.5,)), request(0.0, (2.0,))


def run_with_share(share: float, num_requests: int = 100, was_interrupted: bool = False) -> Run:
    num_fast = round(share * num_requests)
    return run_of(*[FAST] * num_fast, *[SLOW] * (num_requests - num_fast), was_interrupted=was_interrupted)


def server(capacity: float) -> Callable[[float], Awaitable[Run]]:
    """All requests are fast up to the capacity; beyond it, only so many as it can serve."""

    async def measure(rate: float) -> Run:
        return run_with_share(min(1.0, capacity / rate) ** 8)

    return measure


async def search(measure: Callable[[float], Awaitable[Run]], **changes: Any) -> RateSearch:
    options = {"low_rate": 1.0, "high_rate": 64.0} | changes
    return await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, **options)


@given(st.floats(1.02, 60.0), st.sampled_from((0.05, 0.1, 0.2)))
async def test_the_rate_of_a_monotone_server_is_found_to_the_resolution(capacity: float, resolution: float) -> None:
    highest = capacity * 0.895 ** (-1 / 8)  # where a share of 0.895 rounds to 90 of 100
    result = await search(server(capacity), resolution=resolution)
    assert result.ending is Ending.RESOLVED
    assert result.answer is not None
    assert result.answer <= highest * 1.001
    assert result.answer * (1 + resolution) >= highest * 0.999
    assert len(result.probes) <= 12


async def test_growth_doubles_and_bisection_takes_the_middle_ratio() -> None:
    result = await search(server(5.0), resolution=0.3)
    assert [probe.rate for probe in result.probes] == pytest.approx([1, 2, 4, 8, math.sqrt(32), math.sqrt(4 * 32**0.5)])
    assert [probe.is_met for probe in result.probes] == [True, True, True, False, False, True]
    assert result.answer == pytest.approx(4.757, abs=1e-3)


async def test_the_highest_rate_allowed_is_tried_and_is_the_answer_if_it_meets() -> None:
    result = await search(server(1000.0), high_rate=5.0)
    assert [probe.rate for probe in result.probes] == [1, 2, 4, 5]
    assert (result.answer, result.ending) == (5.0, Ending.HIGH_RATE_MET)


async def test_no_answer_if_even_the_lowest_rate_misses() -> None:
    result = await search(server(0.5))
    assert (result.answer, result.ending, len(result.probes)) == (None, Ending.LOW_RATE_MISSED, 1)


async def test_no_answer_from_runs_without_a_request() -> None:
    async def measure(rate: float) -> Run:
        return EMPTY

    result = await search(measure)
    assert (result.answer, result.ending) == (None, Ending.LOW_RATE_MISSED)


async def test_the_best_so_far_is_the_answer_when_runs_are_used_up() -> None:
    result = await search(server(5.0), resolution=0.001, max_runs=5)
    assert (result.ending, len(result.probes), result.answer) == (Ending.MAX_RUNS, 5, 4.0)


async def test_a_search_that_is_just_done_has_not_used_up_its_runs() -> None:
    result = await search(server(5.0), resolution=0.3, max_runs=6)
    assert (result.ending, len(result.probes)) == (Ending.RESOLVED, 6)


async def test_an_interrupted_run_ends_the_search_and_decides_nothing() -> None:
    async def measure(rate: float) -> Run:
        return run_with_share(1.0, was_interrupted=rate == 4)

    result = await search(measure)
    assert (result.answer, result.ending, len(result.probes)) == (2.0, Ending.INTERRUPTED, 3)


async def test_an_error_after_the_first_run_ends_the_search_and_keeps_what_was_found() -> None:
    async def measure(rate: float) -> Run:
        if rate == 4:
            raise Unavailable("gone")
        return run_with_share(1.0)

    result = await search(measure)
    assert (result.answer, result.ending, len(result.probes)) == (2.0, Ending.FAILED, 2)
    assert result.failure == "Unavailable: gone"


async def test_an_error_of_the_first_run_is_raised() -> None:
    async def measure(rate: float) -> Run:
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        await search(measure)


async def test_a_run_that_was_cut_short_is_kept_and_decides_nothing() -> None:
    async def measure(rate: float) -> Run:
        return run_of(FAST, failure="InternalError: gone" if rate == 4 else "", was_interrupted=rate == 4)

    result = await search(measure)
    assert (result.answer, result.ending, len(result.probes)) == (2.0, Ending.FAILED, 3)
    assert result.failure == "InternalError: gone"


LATE = request(0.0, (2.0,), sent_s=1.5)
UNSENT = request(0.0, outcome="GeneratorOverloaded")


@pytest.mark.parametrize("fault", [LATE, UNSENT], ids=["late", "unsent"])
async def test_a_miss_that_the_generator_made_ends_the_search_and_is_none(fault: RequestRecord) -> None:
    async def measure(rate: float) -> Run:
        return run_of(*[FAST] * 80, *[fault] * 20) if rate == 4 else run_with_share(1.0)

    result = await search(measure)
    assert (result.answer, result.ending, len(result.probes)) == (2.0, Ending.GENERATOR_LIMIT, 3)


@pytest.mark.parametrize("fault", [LATE, UNSENT], ids=["late", "unsent"])
async def test_a_rate_that_the_server_would_miss_anyway_is_a_miss(fault: RequestRecord) -> None:
    async def measure(rate: float) -> Run:
        return run_of(*[FAST] * 60, *[SLOW] * 20, *[fault] * 20) if rate >= 4 else run_with_share(1.0)

    result = await search(measure, resolution=0.5)
    assert (result.ending, len(result.probes)) == (Ending.RESOLVED, 4)
    assert result.answer == pytest.approx(2 * math.sqrt(2))


async def test_a_rate_that_is_met_although_the_generator_was_late_is_met() -> None:
    async def measure(rate: float) -> Run:
        return run_of(*[FAST] * 95, *[LATE] * 5)

    assert (await search(measure)).ending is Ending.HIGH_RATE_MET


@given(st.lists(st.booleans(), min_size=12, max_size=12))
async def test_whatever_noise_does_the_answer_met_and_is_below_every_miss(verdicts: list[bool]) -> None:
    left = iter(verdicts)

    async def measure(rate: float) -> Run:
        return run_with_share(1.0 if next(left) else 0.0)

    result = await search(measure)
    met = [probe.rate for probe in result.probes if probe.is_met]
    missed = [probe.rate for probe in result.probes if not probe.is_met]
    assert result.answer == max(met, default=None)
    assert result.answer is None or all(result.answer < rate for rate in missed)
    assert len(set(met + missed)) == len(result.probes) <= 12


async def test_results_within_two_standard_errors_are_close_calls() -> None:
    shares = iter((1.0, 0.93, 0.85, 0.5))

    async def measure(rate: float) -> Run:
        return run_with_share(next(shares))

    result = await search(measure, max_runs=4, resolution=0.001)
    assert [probe.is_close_call for probe in result.probes] == [False, True, True, False]


def test_no_run_is_needed_once_the_bracket_is_narrow() -> None:
    bounds = Bounds(1.0, 64.0, resolution=0.05, max_runs=12)
    assert next_rate([], [], bounds) == 1.0
    assert next_rate([4.0], [4.2], bounds) is Ending.RESOLVED
    assert next_rate([4.0], [4.41], bounds) == pytest.approx(4.2)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("low_rate", {"low_rate": 0.0}),
        ("high_rate", {"high_rate": 0.5}),
        ("high_rate", {"high_rate": math.inf}),
        ("resolution", {"resolution": 0.0}),
        ("max_runs", {"max_runs": 0}),
    ],
)
async def test_bounds_that_make_no_sense_are_refused_by_name(field: str, changes: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=field):
        await search(server(1.0), **changes)


@pytest.mark.parametrize(("field", "itl_s", "share"), [("itl_s", 0.0, 0.9), ("share", 0.1, 0.0), ("share", 0.1, 1.1)])
async def test_what_is_asked_for_is_checked(field: str, itl_s: float, share: float) -> None:
    with pytest.raises(InvalidArgument, match=field):
        await find_rate(server(1.0), LIMITS, itl_s, share, 1.0, 2.0)
