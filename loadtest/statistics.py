"""What a run comes to: latencies, throughput, errors, and whether the generator itself kept time. Pure.

A percentile is the *nearest rank*: the smallest value that occurred such that so many percent of all values are not
above it (numpy's `inverted_cdf`). So it is never a value in between; the p99 of fewer than 100 values is the largest.
Tokens that came in one message are one arrival, so a gap is a time between messages; TPOT divides by tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.measured import Floats, Measured
from loadtest.record import GENERATOR_OVERLOADED, RequestRecord

MAX_SCHEDULING_ERROR_S = 0.005
_EXAMPLE_CHARS = 300
_MAX_FAILED_SHARE = 0.01  # more of them than this could be the whole tail that a p99 is read for


@dataclass(frozen=True, slots=True)
class Distribution:
    """Order statistics of some times, in seconds."""

    num_values: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """How many measured requests ended with one type of error, and the message of the first of them."""

    outcome: str
    num_requests: int
    example: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run, warm-up left out. A distribution is None where there was nothing to measure."""

    num_warmup: int
    num_ok: int
    num_failed: int
    num_interrupted: int
    num_short: int  # finished with fewer tokens than were asked for
    window_s: float  # first measured request due to last one ended
    offered_rate: float | None  # requests/s that became due
    ttft: Distribution | None
    tpot: Distribution | None
    gap: Distribution | None
    end_to_end: Distribution | None
    requests_per_s: float | None  # finished ones, over the window; so are the tokens
    input_tokens_per_s: float | None
    output_tokens_per_s: float | None
    tokens_per_message: float | None
    cached_share: float | None  # of the prompt tokens of finished requests, as the server said
    errors: tuple[ErrorCount, ...]
    scheduling_error: Distribution | None  # sent − due of all requests but the interrupted
    phases: dict[str, Distribution]  # the server's own account of finished requests, by name
    warnings: tuple[str, ...]  # what a reader must know before believing a figure


def distribution(values_s: Floats | Sequence[float]) -> Distribution | None:
    """Order statistics by nearest rank; None of nothing."""
    values = np.asarray(values_s, np.float64)
    if not values.size:
        return None
    p50_s, p90_s, p99_s, max_s = np.percentile(values, (50, 90, 99, 100), method="inverted_cdf").tolist()
    # The sum of floats rounds: a mean must not leave the range of its values by that.
    mean_s = min(max(float(values.mean()), float(values.min())), max_s)
    return Distribution(values.size, mean_s, p50_s, p90_s, p99_s, max_s)


def summarize(measured: Measured) -> Summary:
    """All figures of a run."""
    finished = measured.finished
    num_prompt_tokens = sum(record.num_prompt_tokens for record in finished)
    num_messages = sum(len(record.arrivals) for record in finished)
    num_output_tokens = sum(record.num_output_tokens for record in finished)
    scheduling_error = distribution([record.sent_s - record.due_s for record in finished + measured.failed])
    return Summary(
        num_warmup=measured.num_warmup,
        num_ok=len(finished),
        num_failed=len(measured.failed),
        num_interrupted=len(measured.interrupted),
        num_short=_num_short(finished),
        window_s=measured.window_s,
        offered_rate=measured.offered_rate,
        ttft=distribution(measured.ttft_s),
        tpot=distribution(measured.tpot_s[~np.isnan(measured.tpot_s)]),
        gap=distribution(measured.gaps_s),
        end_to_end=distribution(measured.end_to_end_s),
        requests_per_s=_per_s(len(finished), measured),
        input_tokens_per_s=_per_s(num_prompt_tokens, measured),
        output_tokens_per_s=_per_s(num_output_tokens, measured),
        tokens_per_message=num_output_tokens / num_messages if num_messages else None,
        cached_share=_cached_share(finished, num_prompt_tokens),
        errors=_errors(measured.failed),
        scheduling_error=scheduling_error,
        phases=_phases(finished),
        warnings=(*_generator_warnings(measured, scheduling_error), *_server_warnings(measured)),
    )


def has_many_failures(summary: Summary) -> bool:
    """Whether so many measured requests failed that the figures of the others cannot stand for all."""
    return summary.num_failed > _MAX_FAILED_SHARE * (summary.num_ok + summary.num_failed)


def is_generator_behind(summary: Summary) -> bool:
    """Whether the generator did not send what was due when it was due, so that figures are not the server's alone."""
    is_late = summary.scheduling_error is not None and summary.scheduling_error.p99_s > MAX_SCHEDULING_ERROR_S
    return is_late or any(error.outcome == GENERATOR_OVERLOADED for error in summary.errors)


def is_punctual(record: RequestRecord) -> bool:
    """Whether a request was sent, and when it was due."""
    return record.outcome != GENERATOR_OVERLOADED and record.sent_s - record.due_s <= MAX_SCHEDULING_ERROR_S


def _per_s(amount: int, measured: Measured) -> float | None:
    return amount / measured.window_s if measured.window_s else None


def _cached_share(finished: tuple[RequestRecord, ...], num_prompt_tokens: int) -> float | None:
    if not num_prompt_tokens:
        return None
    return sum(record.num_cached_tokens for record in finished) / num_prompt_tokens


def _errors(failed: tuple[RequestRecord, ...]) -> tuple[ErrorCount, ...]:
    """By type, most frequent first."""
    counts = Counter(record.outcome for record in failed)
    examples = {record.outcome: record.detail for record in reversed(failed)}
    return tuple(ErrorCount(name, num, examples[name][:_EXAMPLE_CHARS]) for name, num in counts.most_common())


def _phases(finished: tuple[RequestRecord, ...]) -> dict[str, Distribution]:
    values_s: dict[str, list[float]] = {}
    for record in finished:
        for name, value_ns in record.lifetime_ns.items():
            values_s.setdefault(name.removesuffix("_ns"), []).append(value_ns * 1e-9)
    phases = {name: distribution(values) for name, values in values_s.items()}
    return {name: phase for name, phase in phases.items() if phase is not None}


def _num_short(finished: tuple[RequestRecord, ...]) -> int:
    return sum(record.num_output_tokens < record.max_tokens for record in finished)


def _generator_warnings(measured: Measured, scheduling_error: Distribution | None) -> list[str]:
    warnings = []
    if scheduling_error is not None and scheduling_error.p99_s > MAX_SCHEDULING_ERROR_S:
        warnings.append(
            f"The generator was late: the p99 of sent − due is {scheduling_error.p99_s * 1e3:.1f} ms, above "
            f"{MAX_SCHEDULING_ERROR_S * 1e3:.0f} ms. These figures are the generator's, not the server's."
        )
    num_unsent = sum(record.outcome == GENERATOR_OVERLOADED for record in measured.failed)
    if num_unsent:
        warnings.append(
            f"The generator did not send {num_unsent} requests: too many were in flight. They count as failed, though "
            "the server never saw them: these figures are the generator's, not the server's."
        )
    return warnings


def _server_warnings(measured: Measured) -> list[str]:
    warnings = []
    num_short = _num_short(measured.finished)
    if num_short:
        warnings.append(
            f"{num_short} of {len(measured.finished)} finished requests brought fewer tokens than were asked for: the "
            "server bore less load than the workload says, and looks better than one that sends them all."
        )
    if measured.interrupted:
        warnings.append(
            f"Interrupted: {len(measured.interrupted)} requests had not ended and are in no figure. Long requests are "
            "more often among them, so latencies look shorter than they are."
        )
    if not measured.num_counted:
        warnings.append(f"No measured request ended: {measured.num_warmup} warm-up requests, nothing to report.")
    elif not measured.finished:
        warnings.append(f"All {measured.num_counted} measured requests failed: there are no latencies.")
    elif len(measured.failed) > _MAX_FAILED_SHARE * measured.num_counted:
        warnings.append(
            f"{len(measured.failed)} of {measured.num_counted} measured requests failed. Latencies are those of the "
            "others, so percentiles look better than what clients saw; goodput counts the failed ones as missed."
        )
    return warnings
