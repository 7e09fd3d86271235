"""Who meets a limit, by each way to judge; goodput is a share and rises with the limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidArgument
from loadtest.goodput import Goodput, Limits, Variant, goodput, goodputs
from loadtest.measured import Measured, measured_part
from tests.loadtest.sample_runs import ALL_FAILED, EMPTY, INTERRUPTED_RUN, random_run, request, run_of

RANDOM = measured_part(random_run(8.0, num_requests=200))
SECONDS = st.floats(1e-4, 1.0)


def paced(gaps_s: list[float], ttft_s: float = 0.1) -> Measured:
    return measured_part(run_of(request(0.0, np.cumsum([ttft_s, *gaps_s]).tolist())))


def met(measured: Measured, itl_s: float | None, variant: Variant, ttft_s: float | None = None) -> int:
    return goodput(measured, ttft_s, itl_s, variant).num_met


def test_one_stall_misses_by_every_gap_only() -> None:
    stalled = paced([0.01] * 199 + [0.4])
    assert met(stalled, 0.05, Variant.EVERY_GAP) == 0
    assert met(stalled, 0.05, Variant.P99_GAP) == 1
    assert met(stalled, 0.05, Variant.MEAN_TPOT) == 1


def test_a_value_equal_to_its_limit_meets_it() -> None:
    request_ = paced([0.05, 0.05], ttft_s=0.2)
    assert met(request_, 0.05, Variant.EVERY_GAP, ttft_s=0.2) == 1
    assert met(request_, 0.0499, Variant.EVERY_GAP, ttft_s=0.2) == 0
    assert met(request_, 0.05, Variant.EVERY_GAP, ttft_s=0.199) == 0


@pytest.mark.parametrize("variant", list(Variant))
def test_one_token_meets_any_limit_on_gaps(variant: Variant) -> None:
    assert met(paced([]), 1e-6, variant) == 1


def test_tokens_that_come_together_hide_no_stall() -> None:
    merged = measured_part(run_of(request(0.0, (0.1, 0.4), tokens=(1, 10))))
    assert met(merged, 0.05, Variant.EVERY_GAP) == 0
    assert met(merged, 0.05, Variant.MEAN_TPOT) == 1


def test_failed_requests_are_missed_and_interrupted_ones_are_neither() -> None:
    good = request(0.0, (0.1, 0.12))
    slow = request(0.0, (3.0, 3.02))
    failed = request(0.0, (0.1, 0.12), outcome="Unavailable", ended_s=4.0)
    stopped = request(0.0, (0.1,), outcome="Interrupted", ended_s=4.0)
    result = goodput(measured_part(run_of(good, good, slow, failed, stopped)), 1.0, 0.05)
    assert result == Goodput(Variant.EVERY_GAP, 1.0, 0.05, 2, 4, 1, 0.5, 0.5)


def test_an_answer_without_tokens_is_judged_by_its_end() -> None:
    empty = measured_part(run_of(request(0.0, ended_s=0.5)))
    assert met(empty, 0.05, Variant.EVERY_GAP, ttft_s=0.5) == 1
    assert met(empty, 0.05, Variant.EVERY_GAP, ttft_s=0.4) == 0


def test_every_limit_is_judged_in_each_way_the_headline_first() -> None:
    rows = goodputs(RANDOM, Limits(0.5, (0.05, 0.02)))
    assert [(row.itl_s, row.variant) for row in rows] == [(itl_s, way) for itl_s in (0.05, 0.02) for way in Variant]
    assert rows[0].variant is Variant.EVERY_GAP


def test_without_limits_every_finished_request_meets() -> None:
    (row,) = goodputs(RANDOM, Limits(None, ()))
    assert (row.num_met, row.num_counted) == (len(RANDOM.finished), 200)
    assert len(RANDOM.finished) < 200


def test_runs_without_a_finished_request() -> None:
    nothing = goodput(measured_part(EMPTY), 1.0, 0.05)
    assert (nothing.share, nothing.requests_per_s) == (None, None)
    assert goodput(measured_part(ALL_FAILED), None, None).share == 0.0
    assert goodput(measured_part(INTERRUPTED_RUN), None, 1.0).num_interrupted == 1


@given(SECONDS, SECONDS, SECONDS, st.sampled_from(list(Variant)))
def test_goodput_is_a_share_and_rises_with_the_limits(ttft_s: float, itl_s: float, more: float, way: Variant) -> None:
    result = goodput(RANDOM, ttft_s, itl_s, way)
    assert result.share is not None
    assert 0 <= result.share <= 1
    assert goodput(RANDOM, ttft_s + more, itl_s, way).num_met >= result.num_met
    assert goodput(RANDOM, ttft_s, itl_s + more, way).num_met >= result.num_met
    assert goodput(RANDOM, None, None, way).num_met >= result.num_met


@given(SECONDS, SECONDS)
def test_every_gap_is_the_strictest_way_to_judge(ttft_s: float, itl_s: float) -> None:
    by_way = {way: goodput(RANDOM, ttft_s, itl_s, way).num_met for way in Variant}
    assert by_way[Variant.EVERY_GAP] == min(by_way.values())


@pytest.mark.parametrize("value_s", [0.0, -1.0, math.inf, math.nan])
def test_limits_that_are_no_times_are_refused_by_name(value_s: float) -> None:
    with pytest.raises(InvalidArgument, match="ttft_s"):
        Limits(value_s, ())
    with pytest.raises(InvalidArgument, match="itl_s"):
        Limits(None, (0.1, value_s))
