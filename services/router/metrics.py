"""What the router measures. Counted once per request; a gap between two messages once per message."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common import errors
from common.telemetry.counters import CounterSpec, by_label
from common.telemetry.histogram import (
    FIRST_TOKEN_BUCKETS_S,
    INTER_TOKEN_BUCKETS_S,
    REQUEST_BUCKETS_S,
    WAIT_BUCKETS_S,
    Histogram,
)
from common.telemetry.metrics import GaugeSpec, Level, Metrics

PREFIX = "baton_router_"
OK = "ok"


def _error_names(error_class: type[errors.BatonError]) -> list[str]:
    return [error_class.__name__, *(name for sub in error_class.__subclasses__() for name in _error_names(sub))]


OUTCOMES = (OK, *_error_names(errors.BatonError))

COUNTERS = {
    **by_label(
        "requests",
        "Requests that ended, by outcome: ok, or the error that the client was told.",
        "outcome",
        {outcome: f"requests_{outcome}" for outcome in OUTCOMES},
    ),
    "prompt_tokens": CounterSpec("prompt_tokens", "Tokens of prompts, of requests that were tokenised."),
    "output_tokens": CounterSpec("output_tokens", "Tokens that were generated."),
    "messages": CounterSpec("messages", "Messages to clients."),
    "migrations": CounterSpec("migrations", "Sequences that moved: a preemption, or a worker that died."),
}

GAUGES = {
    "sequences_in_flight": GaugeSpec("Sequences under way."),
    "requests_waiting": GaugeSpec("Requests that wait to be admitted."),
    "outputs_unread": GaugeSpec("Complete outputs that their clients have not read."),
    "workers_ready": GaugeSpec("Workers that take requests, by role.", "role"),
}


class RouterMetrics(Metrics):
    """Counters by name; histograms as attributes."""

    def __init__(self) -> None:
        self.queue_wait = Histogram("queue_wait_seconds", "Received to admitted.", WAIT_BUCKETS_S)
        self.tokenize_duration = Histogram("tokenize_duration_seconds", "Text to token ids.", WAIT_BUCKETS_S)
        self.placement_wait = Histogram("placement_wait_seconds", "Until workers were found.", WAIT_BUCKETS_S)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "Request received to first token sent.", FIRST_TOKEN_BUCKETS_S
        )
        self.inter_token = Histogram(
            "inter_token_seconds", "Between messages of an output that bring tokens.", INTER_TOKEN_BUCKETS_S
        )
        self.request_duration = Histogram(
            "request_duration_seconds", "Request received to its end, whatever that was.", REQUEST_BUCKETS_S
        )
        waits = (self.queue_wait, self.tokenize_duration, self.placement_wait)
        super().__init__(PREFIX, COUNTERS, (*waits, self.first_token, self.inter_token, self.request_duration))

    def watch(self, read: Callable[[], Mapping[str, Level]]) -> None:
        """Read the gauges from here whenever somebody scrapes, on the scraping thread."""
        self.set_gauges(GAUGES, read)


def outcome_of(error: BaseException, known: errors.BatonError | None) -> str:
    """The outcome of a request that ended with `error`, in which `known` was found."""
    if known is not None:
        name = type(known).__name__
        return name if name in OUTCOMES else errors.BatonError.__name__
    # Not an Exception: asyncio.CancelledError, when the client is gone.
    return errors.InternalError.__name__ if isinstance(error, Exception) else errors.Cancelled.__name__
