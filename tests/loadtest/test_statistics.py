"""Figures of small runs by hand, order statistics of any, and what a summary warns of."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.measured import measured_part
from loadtest.record import Run
from loadtest.statistics import Distribution, ErrorCount, Summary, distribution, summarize
from tests.loadtest.sample_runs import ALL_AT_ONCE, ALL_FAILED, ALL_WARMUP, EMPTY, INTERRUPTED_RUN, request, run_of


def summary_of(run: Run) -> Summary:
    return summarize(measured_part(run))


def assert_close(values: Distribution | None, expected: Distribution) -> None:
    """Equal but for float noise."""
    assert values is not None
    assert astuple(values) == pytest.approx(astuple(expected))


def test_percentiles_are_values_that_occurred() -> None:
    assert distribution([4.0, 1.0, 3.0, 2.0]) == Distribution(4, 2.5, 2.0, 4.0, 4.0, 4.0)
    assert distribution([float(n) for n in range(1, 201)]) == Distribution(200, 100.5, 100.0, 180.0, 198.0, 200.0)
    assert distribution([0.5]) == Distribution(1, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert distribution([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_order_statistics_rise_and_stay_within_the_values(values: list[float]) -> None:
    result = distribution(values)
    assert result is not None
    assert min(values) <= result.p50_s <= result.p90_s <= result.p99_s <= result.max_s == max(values)
    assert min(values) <= result.mean_s <= max(values)
    assert {result.p50_s, result.p90_s, result.p99_s} <= set(values)


def test_latencies_and_throughput_by_hand() -> None:
    summary = summary_of(
        run_of(
            request(-3.0, (-1.0,), is_warmup=True, num_prompt_tokens=1000),
            request(0.0, (0.2, 0.3, 0.5), tokens=(1, 1, 2), num_cached_tokens=4),
            request(1.0, (1.4,), num_prompt_tokens=30),
            request(2.0, (2.1,), outcome="Unavailable", ended_s=4.0, num_prompt_tokens=500),
        )
    )
    assert_close(summary.ttft, Distribution(2, 0.3, 0.2, 0.4, 0.4, 0.4))
    assert_close(summary.gap, Distribution(2, 0.15, 0.1, 0.2, 0.2, 0.2))
    assert_close(summary.tpot, Distribution(1, 0.1, 0.1, 0.1, 0.1, 0.1))
    assert_close(summary.end_to_end, Distribution(2, 0.45, 0.4, 0.5, 0.5, 0.5))
    assert (summary.num_ok, summary.num_failed, summary.num_warmup, summary.window_s) == (2, 1, 1, 4.0)
    assert summary.requests_per_s == 0.5
    assert summary.input_tokens_per_s == 10.0
    assert summary.output_tokens_per_s == 1.25
    assert summary.cached_share == 0.1
    assert summary.tokens_per_message == 1.25
    assert summary.offered_rate == 1.0


def test_errors_are_counted_by_type_with_the_first_message() -> None:
    failures = [("Unavailable", "first"), ("DeadlineExceeded", "late"), ("Unavailable", "second")]
    summary = summary_of(run_of(*(request(outcome=outcome, detail=detail) for outcome, detail in failures)))
    assert summary.errors == (ErrorCount("Unavailable", 2, "first"), ErrorCount("DeadlineExceeded", 1, "late"))


def test_the_servers_own_account_is_of_finished_requests() -> None:
    kept = request(0.0, (0.1,), lifetime_ns={"queue_ns": 5_000_000})
    failed = request(0.0, outcome="Unavailable", lifetime_ns={"queue_ns": 9_000_000_000})
    phase = summary_of(run_of(kept, failed)).phases["queue"]
    assert_close(phase, Distribution(1, 0.005, 0.005, 0.005, 0.005, 0.005))


def test_a_late_generator_is_named() -> None:
    on_time = run_of(*(request(0.0, (1.0,), sent_s=0.005) for _ in range(100)))
    one_late = run_of(*(request(0.0, (1.0,), sent_s=0.2 if n == 0 else 0.001) for n in range(100)))
    two_late = run_of(*(request(0.0, (1.0,), sent_s=0.2 if n < 2 else 0.001) for n in range(100)))
    assert summary_of(on_time).warnings == summary_of(one_late).warnings == ()
    (warning,) = summary_of(two_late).warnings
    assert "200.0 ms" in warning
    assert "the generator's, not the server's" in warning


def test_requests_that_the_generator_never_sent_are_named() -> None:
    unsent = [request(0.0, outcome="GeneratorOverloaded")] * 2
    warnings = summary_of(run_of(*unsent, *[request(0.0, (1.0,))] * 300)).warnings
    assert [warning for warning in warnings if "did not send 2 requests" in warning]


def test_outputs_shorter_than_asked_for_are_counted_and_named() -> None:
    whole, short = request(0.0, (1.0,), max_tokens=1), request(0.0, (1.0, 2.0), tokens=(2, 1), max_tokens=4)
    failed = request(0.0, (1.0,), max_tokens=9, outcome="Unavailable", ended_s=1.0)
    summary = summary_of(run_of(short, short, failed, *[whole] * 98))
    assert summary.num_short == 2
    (warning,) = summary.warnings
    assert warning.startswith("2 of 100 finished requests brought fewer tokens than were asked for")
    assert summary_of(run_of(whole)).warnings == ()


def test_failures_are_a_warning_once_they_could_be_the_whole_p99() -> None:
    good, bad = request(0.0, (1.0,)), request(0.0, outcome="Unavailable")
    assert summary_of(run_of(bad, *[good] * 99)).warnings == ()
    (warning,) = summary_of(run_of(bad, bad, *[good] * 98)).warnings
    assert warning.startswith("2 of 100 measured requests failed")


def test_runs_with_nothing_to_measure_say_so() -> None:
    assert "nothing to report" in summary_of(EMPTY).warnings[0]
    assert "1 warm-up requests" in summary_of(ALL_WARMUP).warnings[0]
    assert "All 2 measured requests failed" in summary_of(ALL_FAILED).warnings[0]
    assert "Interrupted: 1 requests" in summary_of(INTERRUPTED_RUN).warnings[0]
    nothing = summary_of(EMPTY)
    assert nothing.ttft is nothing.tpot is nothing.gap is nothing.end_to_end is None
    assert nothing.requests_per_s is nothing.cached_share is nothing.tokens_per_message is None
    assert summary_of(ALL_AT_ONCE).requests_per_s is None
