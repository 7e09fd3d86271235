"""Runs for the tests of measurements and reports: small ones written out by hand, and a realistic one from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtest.record import OK, Arrival, PoolSample, RequestRecord, Run, RunInfo


def request(
    due_s: float = 0.0,
    arrived_s: Sequence[float] = (),
    *,
    outcome: str = OK,
    ended_s: float | None = None,
    sent_s: float | None = None,
    tokens: Sequence[int] | None = None,
    max_tokens: int | None = None,
    num_prompt_tokens: int = 10,
    num_cached_tokens: int = 0,
    detail: str = "",
    is_warmup: bool = False,
    lifetime_ns: dict[str, int] | None = None,
) -> RequestRecord:
    """A request whose messages came at these moments, one token each, as many as asked for; if not said otherwise."""
    counts = tokens or [1] * len(arrived_s)
    last_s = arrived_s[-1] if arrived_s else due_s
    return RequestRecord(
        index=0,
        due_s=due_s,
        sent_s=due_s if sent_s is None else sent_s,
        ended_s=last_s if ended_s is None else ended_s,
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=sum(counts) if max_tokens is None else max_tokens,
        arrivals=tuple(Arrival(at_s, count) for at_s, count in zip(arrived_s, counts, strict=True)),
        outcome=outcome,
        detail=detail,
        is_warmup=is_warmup,
        num_cached_tokens=num_cached_tokens,
        lifetime_ns=lifetime_ns or {},
    )


def run_of(
    *records: RequestRecord,
    model: str = "small",
    command: str = "baton bench",
    case: str = "",
    was_interrupted: bool = False,
    failure: str = "",
) -> Run:
    """A run of these records."""
    info = RunInfo(
        target="127.0.0.1:50051",
        kind="baton",
        model=model,
        machine="2 cores",
        started_at="2026-11-25T20:00:00+00:00",
        command=command,
        workload="Poisson",
        seed=7,
        case=case,
        scaling=("lengths × 0.05",),
        was_interrupted=was_interrupted,
        failure=failure,
    )
    return Run(info=info, records=records)


def random_run(rate: float, num_requests: int = 100, num_tokens: int = 20, seed: int = 0) -> Run:
    """A server whose queue grows with the rate; some requests fail; queues are sampled."""
    random = np.random.default_rng(seed)
    dues_s = np.cumsum(random.exponential(1 / rate, num_requests)).tolist()
    records = []
    for due_s in dues_s:
        gaps_s = random.lognormal(-4, 0.2, num_tokens)
        gaps_s[0] += 0.05 + random.exponential(0.01 * rate)
        arrived_s = (due_s + np.cumsum(gaps_s)).tolist()
        if random.random() < 0.05:
            records.append(request(due_s, outcome="ResourceExhausted", ended_s=due_s + 0.1, detail="the queue is full"))
        else:
            records.append(request(due_s, arrived_s, lifetime_ns={"prefill_ns": int(gaps_s[0] * 1e9)}))
    run = run_of(*records)
    samples = tuple(PoolSample(float(at_s), 1, 2, 3, 4) for at_s in np.arange(0, dues_s[-1], 0.25))
    return Run(info=run.info, records=run.records, samples=samples)


EMPTY = run_of()
ALL_WARMUP = run_of(request(0.0, (0.1, 0.2), is_warmup=True))
ALL_FAILED = run_of(*(request(t, outcome="Unavailable", ended_s=t + 0.5, detail="no worker") for t in (0.0, 1.0)))
ONE_TOKEN = run_of(request(0.0, (0.1,)), request(1.0, (1.2,)))
ONE_REQUEST = run_of(request(0.0, (0.1, 0.2)))
ALL_AT_ONCE = run_of(request(), request())  # nothing takes any time
INTERRUPTED_RUN = run_of(
    request(0.0, (0.1, 0.2)), request(0.5, (0.7,), outcome="Interrupted", ended_s=1.0), was_interrupted=True
)
ODD_RUNS = {
    "empty": EMPTY,
    "all warm-up": ALL_WARMUP,
    "all failed": ALL_FAILED,
    "one token each": ONE_TOKEN,
    "one request": ONE_REQUEST,
    "no time passes": ALL_AT_ONCE,
    "interrupted": INTERRUPTED_RUN,
}
