"""What is known of one request of a load test, and of the run that it belongs to. Plain values, encoded by msgspec.

Times are seconds of the run's clock: 0 is the moment at which the first request was due. Latency counts from when a
request was *due*, not from when it was sent, so that a generator that falls behind cannot hide it (no coordinated
omission; Gil Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

import msgspec

OK = "ok"
# Outcomes that the generator makes itself; all others are names of error types.
INTERRUPTED = "Interrupted"  # the run was stopped while the request was under way
GENERATOR_OVERLOADED = "GeneratorOverloaded"  # not sent: the generator's own bound on requests in flight was reached


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One message that brought tokens."""

    at_s: float
    num_tokens: int


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request, from when it was due to how it ended."""

    index: int  # in order of the workload
    due_s: float
    sent_s: float
    ended_s: float
    num_prompt_tokens: int
    max_tokens: int
    arrivals: tuple[Arrival, ...]
    outcome: str  # `ok`, or the name of an error's type: `ResourceExhausted`, `DeadlineExceeded`, `Interrupted`, ...
    detail: str = ""  # an error's message
    is_warmup: bool = False
    num_cached_tokens: int = 0  # as the server said; 0 if it says nothing
    lifetime_ns: dict[str, int] = msgspec.field(default_factory=dict)  # the server's own account, by name; may be empty

    @property
    def is_ok(self) -> bool:
        return self.outcome == OK

    @property
    def num_output_tokens(self) -> int:
        return sum(arrival.num_tokens for arrival in self.arrivals)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Due to first token; None if there was none."""
        return self.arrivals[0].at_s - self.due_s if self.arrivals else None

    @property
    def end_to_end_s(self) -> float:
        """Due to last token, or to the error."""
        return (self.arrivals[-1].at_s if self.arrivals and self.is_ok else self.ended_s) - self.due_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between messages that brought tokens. Tokens that came together are one arrival, not gaps of zero."""
        return tuple(after.at_s - before.at_s for before, after in zip(self.arrivals, self.arrivals[1:], strict=False))

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of a token after the first message; None if only one message came."""
        num_later = self.num_output_tokens - (self.arrivals[0].num_tokens if self.arrivals else 0)
        return (self.arrivals[-1].at_s - self.arrivals[0].at_s) / num_later if num_later else None


class PoolSample(msgspec.Struct, frozen=True):
    """The target's pools at one moment, summed over workers; for the report's timeline. Only Baton tells."""

    at_s: float
    num_waiting_prefill: int  # prompts waiting for prefill
    num_running_prefill: int
    num_waiting_decode: int  # sequences that wait to decode: blocks, hand-off, a row
    num_running_decode: int  # the decode batch


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was run, where and when: everything that a figure must carry."""

    target: str  # its address
    kind: str  # `baton` or `openai`
    model: str
    machine: str  # processor, cores, system
    started_at: str  # ISO 8601 with the offset
    command: str
    workload: str  # in words: `Poisson, 4 requests/s`, `Azure trace, rows 0-199, lengths × 0.05`
    seed: int
    case: str = ""  # what was run, where one page compares several: `chunks of 128`
    scaling: tuple[str, ...] = ()  # what was scaled because the user said so; empty: nothing
    was_interrupted: bool = False  # the run ended early: it was stopped, or something failed
    failure: str = ""  # what failed; empty if nothing did
    duration_s: float = 0.0  # first request due to last one ended
    num_processes: int = 1


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A finished, or interrupted, run: the whole input of a report."""

    info: RunInfo
    records: tuple[RequestRecord, ...]
    samples: tuple[PoolSample, ...] = ()
