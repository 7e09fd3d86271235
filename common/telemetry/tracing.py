"""Spans of requests, made from timestamps that were taken anyway. Here is the half that does nothing: tracing is off.

A span begins with a call and is passed along; what happened within is added as children once it is over. OpenTelemetry
is loaded only where an endpoint is set (`otel`). Times are of `time.monotonic_ns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

# Of the settings that every service has.
OTLP_ENDPOINT_HELP = "Where spans go, an OTLP/gRPC endpoint such as http://host:4317; tracing is off if empty."
TRACE_SAMPLE_RATIO_HELP = "Share of the traces beginning here that is recorded, 0 to 1; a caller's decision stands."

TRACEPARENT = "traceparent"
Metadata = Sequence[tuple[str, str]]
Attribute = str | int | float | bool


class Caller(Protocol):
    """A gRPC servicer context, as far as tracing looks at it."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """The metadata that came with the call."""


@dataclass(frozen=True, slots=True)
class Traceparent:
    """A `Caller` who wrote its trace context into a message: the value of a W3C traceparent, or nothing."""

    value: str

    def invocation_metadata(self) -> Metadata:
        return ((TRACEPARENT, self.value),) if self.value else ()


class Span:
    """A span that others may hang under. Of this class: one that nobody records."""

    is_recorded = False

    @property
    def metadata(self) -> Metadata | None:
        """What goes with a gRPC call, so that this is the parent of what is done there; None if nothing need go."""
        return None

    @property
    def traceparent(self) -> str:
        """`metadata`'s traceparent, for a message instead of a call; empty if there is none."""
        return next((value for key, value in self.metadata or () if key == TRACEPARENT), "")

    def child(self, name: str, start_ns: int, end_ns: int, **attributes: Attribute) -> None:
        """Add something that is over. No effect if `start_ns` is 0: it never began."""

    def end(self, end_ns: int, error: str = "", **attributes: Attribute) -> None:
        """The span is over; with `error` it failed. Once, and only by whoever began it."""


NO_SPAN = Span()


class Tracing:
    """Where spans come from. Of this class: nowhere."""

    def begin(self, name: str, caller: Caller, start_ns: int, **attributes: Attribute) -> Span:
        """A span under the caller's, or one that begins a trace. End it."""
        return NO_SPAN

    def parent(self, caller: Caller) -> Span:
        """The caller's own span: children may hang under it, and it is the caller who ends it."""
        return NO_SPAN

    def close(self, timeout_s: float) -> None:
        """Export what is left, for at most so long. Blocks."""


def open_tracing(endpoint: str, sample_ratio: float, service: str, instance: str) -> Tracing:
    """Tracing to an OTLP/gRPC endpoint such as `http://host:4317`; none if that is empty. `sample_ratio` of the traces
    that begin here are recorded; where the caller has decided, his decision holds."""
    if not endpoint:
        return Tracing()
    # Loaded when wanted: the SDK takes memory and start-up time in every process that has it.
    from common.telemetry.otel import export_to

    return export_to(endpoint, sample_ratio, service, instance)
