"""Which requests count, and what their waits and gaps are, down to float noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.measured import measured_part
from tests.loadtest.sample_runs import ALL_AT_ONCE, EMPTY, ONE_TOKEN, random_run, request, run_of


def test_warm_up_is_left_out_and_interrupted_requests_are_set_apart() -> None:
    warm = request(-5.0, (-4.0,), is_warmup=True)
    done = request(0.0, (1.0,))
    failed = request(1.0, outcome="Unavailable", ended_s=2.0)
    stopped = request(2.0, (2.5,), outcome="Interrupted", ended_s=4.0)
    measured = measured_part(run_of(warm, done, failed, stopped))
    assert measured.num_warmup == 1
    assert (measured.finished, measured.failed, measured.interrupted) == ((done,), (failed,), (stopped,))
    assert measured.num_counted == 2
    assert measured.window_s == 4.0
    assert measured.offered_rate == 1.0


def test_gaps_are_between_messages_of_one_request_only() -> None:
    first = request(0.0, (1.0, 1.02, 1.5))
    silent = request(0.1, ended_s=0.2)
    second = request(0.2, (2.0,))
    third = request(0.3, (3.0, 3.25))
    measured = measured_part(run_of(first, silent, second, third))
    assert measured.gaps_s.tolist() == [0.02, 0.48, 0.25]
    assert measured.largest_gap_s.tolist() == [0.48, 0.0, 0.0, 0.25]


def test_float_noise_does_not_move_a_gap_past_its_limit() -> None:
    assert 0.1 + 0.02 - 0.1 > 0.02
    measured = measured_part(run_of(request(0.0, (0.1, 0.1 + 0.02))))
    assert measured.gaps_s.tolist() == [0.02]


def test_merged_tokens_are_one_arrival_but_count_for_the_mean() -> None:
    measured = measured_part(run_of(request(0.0, (1.0, 1.3), tokens=(1, 3))))
    assert measured.gaps_s.tolist() == [0.3]
    assert measured.tpot_s.tolist() == [0.1]


def test_p99_gap_is_the_largest_of_few_and_the_next_of_a_hundred() -> None:
    few = request(0.0, np.cumsum([1.0] + [0.01] * 49 + [0.5]).tolist())
    many = request(0.0, np.cumsum([1.0] + [0.01] * 99 + [0.5]).tolist())
    measured = measured_part(run_of(few, many))
    assert measured.p99_gap_s.tolist() == [0.5, 0.01]


def test_an_answer_without_tokens_waits_until_its_end_and_has_no_ttft() -> None:
    measured = measured_part(run_of(request(0.0, ended_s=0.7), request(1.0, (1.25,))))
    assert measured.wait_s.tolist() == [0.7, 0.25]
    assert measured.ttft_s.tolist() == [0.25]


def test_without_a_span_there_is_no_rate() -> None:
    for run in (EMPTY, ALL_AT_ONCE):
        assert measured_part(run).offered_rate is None
        assert measured_part(run).window_s == 0.0
    assert np.isnan(measured_part(ONE_TOKEN).tpot_s).all()


@given(st.integers(0, 2**32 - 1))
def test_arrays_agree_with_the_records_own_properties(seed: int) -> None:
    measured = measured_part(random_run(2.0, num_requests=6, num_tokens=5, seed=seed))
    expected = [gap for record in measured.finished for gap in record.gaps_s]
    assert measured.gaps_s.tolist() == pytest.approx(expected, abs=2e-9)
    assert measured.largest_gap_s.tolist() == pytest.approx([max(r.gaps_s) for r in measured.finished], abs=2e-9)
    assert measured.end_to_end_s.tolist() == pytest.approx([r.end_to_end_s for r in measured.finished], abs=2e-9)
    for record, tpot_s in zip(measured.finished, measured.tpot_s.tolist(), strict=True):
        assert tpot_s == pytest.approx(record.time_per_output_token_s, abs=2e-9)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=400))
def test_a_requests_p99_is_the_percentile_of_the_summary(gaps_ms: list[int]) -> None:
    arrived_s = (1 + np.cumsum([0, *gaps_ms]) / 1000).tolist()
    measured = measured_part(run_of(request(0.0, arrived_s)))
    expected = float(np.percentile(measured.gaps_s, 99, method="inverted_cdf"))
    assert measured.p99_gap_s.tolist() == [expected]
    assert sorted(gaps_ms)[math.ceil(99 * len(gaps_ms) / 100) - 1] == pytest.approx(expected * 1000)
