"""The measured part of a run as arrays: warm-up left out, interrupted requests set apart. Pure; all figures use it.

Latencies are those of requests that ended `ok`; the others are in `failed`. Float noise below a nanosecond, finer than
any clock here, is rounded away so that it decides no comparison with a limit. Knows no limits and no statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.record import INTERRUPTED, RequestRecord, Run

_DECIMALS = 9

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What the figures of a run come from. If not said otherwise, an array has one entry for each of `finished`."""

    num_warmup: int
    finished: tuple[RequestRecord, ...]
    failed: tuple[RequestRecord, ...]
    interrupted: tuple[RequestRecord, ...]
    window_s: float  # first measured request due to last one ended; 0 if there is none
    offered_rate: float | None  # requests/s that became due; None for fewer than two moments
    wait_s: Floats  # due to first token; to the end where an answer had no token
    ttft_s: Floats  # `wait_s` of the answers that had a token
    end_to_end_s: Floats
    tpot_s: Floats  # NaN where only one message came
    gaps_s: Floats  # every gap of every finished request
    largest_gap_s: Floats  # 0 where there is no gap
    p99_gap_s: Floats  # nearest rank, so the largest of fewer than 100; 0 where there is no gap

    @property
    def num_counted(self) -> int:
        """The requests that a goodput is a share of: finished and failed, not interrupted."""
        return len(self.finished) + len(self.failed)


def measured_part(run: Run) -> Measured:
    """Sort out the records of a run and lay their times out in arrays."""
    records = [record for record in run.records if not record.is_warmup]
    finished = tuple(record for record in records if record.is_ok)
    failed = tuple(record for record in records if not record.is_ok and record.outcome != INTERRUPTED)
    interrupted = tuple(record for record in records if record.outcome == INTERRUPTED)
    num_arrivals = np.fromiter((len(record.arrivals) for record in finished), np.int64, len(finished))
    gaps_s, owners = _gaps(finished, num_arrivals)
    largest_s, p99_s = _largest_and_p99(gaps_s, owners, len(finished))
    wait_s = _per_request([_wait_s(record) for record in finished])
    return Measured(
        num_warmup=len(run.records) - len(records),
        finished=finished,
        failed=failed,
        interrupted=interrupted,
        window_s=_window_s(records),
        offered_rate=_offered_rate(records),
        wait_s=wait_s,
        ttft_s=wait_s[num_arrivals > 0],
        end_to_end_s=_per_request([record.end_to_end_s for record in finished]),
        tpot_s=_per_request([_tpot_s(record) for record in finished]),
        gaps_s=gaps_s,
        largest_gap_s=largest_s,
        p99_gap_s=p99_s,
    )


def _per_request(values: list[float]) -> Floats:
    return np.round(np.array(values, np.float64), _DECIMALS).astype(np.float64, copy=False)


def _wait_s(record: RequestRecord) -> float:
    ttft_s = record.time_to_first_token_s
    return record.end_to_end_s if ttft_s is None else ttft_s


def _tpot_s(record: RequestRecord) -> float:
    tpot_s = record.time_per_output_token_s
    return float("nan") if tpot_s is None else tpot_s


def _window_s(records: list[RequestRecord]) -> float:
    if not records:
        return 0.0
    return max(record.ended_s for record in records) - min(record.due_s for record in records)


def _offered_rate(records: list[RequestRecord]) -> float | None:
    due_s = [record.due_s for record in records]
    span_s = max(due_s) - min(due_s) if due_s else 0.0
    return (len(due_s) - 1) / span_s if span_s > 0 else None


def _gaps(finished: tuple[RequestRecord, ...], num_arrivals: Ints) -> tuple[Floats, Ints]:
    """All gaps, and for each the index of its request: differences of arrivals that belong to the same request."""
    times = (arrival.at_s for record in finished for arrival in record.arrivals)
    arrived_s = np.fromiter(times, np.float64, int(num_arrivals.sum()))
    owners = np.repeat(np.arange(len(finished)), num_arrivals)
    is_gap = owners[1:] == owners[:-1]
    return np.round(np.diff(arrived_s)[is_gap], _DECIMALS), owners[1:][is_gap]


def _largest_and_p99(gaps_s: Floats, owners: Ints, num_requests: int) -> tuple[Floats, Floats]:
    """Two order statistics of each request, from one sort by (request, gap)."""
    num_gaps = np.bincount(owners, minlength=num_requests)
    ends = np.cumsum(num_gaps)
    has_gaps = num_gaps > 0
    in_order = gaps_s[np.lexsort((gaps_s, owners))]
    ranks = -(-99 * num_gaps // 100)  # nearest rank, in integers: ceil(0.99 n)
    largest_s, p99_s = np.zeros(num_requests), np.zeros(num_requests)
    largest_s[has_gaps] = in_order[ends[has_gaps] - 1]
    p99_s[has_gaps] = in_order[(ends - num_gaps + ranks - 1)[has_gaps]]
    return largest_s, p99_s
