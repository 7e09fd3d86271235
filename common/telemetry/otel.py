"""The half of tracing that works: spans in OpenTelemetry, exported in batches over OTLP/gRPC on a thread of its own.

A collector that is slow or gone costs the oldest spans of a bounded queue, never a request. Knows no service.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from threading import Thread

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.telemetry.tracing import Attribute, Caller, Metadata, Span, Tracing

_MAX_QUEUED_SPANS = 8192
_MAX_BATCH_SPANS = 512
_EXPORT_INTERVAL_MS = 500
_EXPORT_TIMEOUT_S = 5.0
_CLOCK_READINGS = 5
_propagator = TraceContextTextMapPropagator()


class OtelTracing(Tracing):
    """Spans of one provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self.tracer = provider.get_tracer("baton")
        # Taken once: all spans of a process keep their order whatever becomes of the wall clock.
        self.wall_offset_ns = _wall_offset_ns()
        self._provider = provider

    def begin(self, name: str, caller: Caller, start_ns: int, **attributes: Attribute) -> Span:
        started = self.tracer.start_span(
            name,
            context=_context_of(caller),
            kind=trace.SpanKind.SERVER,
            attributes=_named(attributes),
            start_time=start_ns + self.wall_offset_ns,
        )
        return OtelSpan(self, started)

    def parent(self, caller: Caller) -> Span:
        return OtelSpan(self, trace.get_current_span(_context_of(caller)))

    def close(self, timeout_s: float) -> None:
        # The SDK would wait for a collector that is gone far longer than anybody waits for a process that stops.
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(timeout_s)


class OtelSpan(Span):
    """A span of this process, or the remote one that a call came with."""

    def __init__(self, tracing: OtelTracing, span: trace.Span) -> None:
        self.is_recorded = span.get_span_context().trace_flags.sampled
        self._tracing = tracing
        self._span = span
        self._context = trace.set_span_in_context(span, Context())

    @property
    def metadata(self) -> Metadata | None:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, self._context)
        return tuple(carrier.items()) or None

    def child(self, name: str, start_ns: int, end_ns: int, **attributes: Attribute) -> None:
        if not start_ns or not self.is_recorded:
            return
        offset_ns = self._tracing.wall_offset_ns
        child = self._tracing.tracer.start_span(
            name, context=self._context, attributes=_named(attributes), start_time=start_ns + offset_ns
        )
        child.end(max(start_ns, end_ns) + offset_ns)

    def end(self, end_ns: int, error: str = "", **attributes: Attribute) -> None:
        if error:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.set_attributes(_named(attributes))
        self._span.end(end_ns + self._tracing.wall_offset_ns)


def _wall_offset_ns() -> int:
    """From monotonic time to the time of day, of several readings the one that took least: a process that loses its
    processor between the two clocks would be early for ever."""
    readings = []
    for _ in range(_CLOCK_READINGS):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


def export_to(endpoint: str, sample_ratio: float, service: str, instance: str) -> Tracing:
    """See `tracing.open_tracing`."""
    resource = Resource({SERVICE_NAME: f"baton-{service}", SERVICE_INSTANCE_ID: instance})
    sampler = ParentBased(TraceIdRatioBased(sample_ratio))
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=_MAX_QUEUED_SPANS,
            schedule_delay_millis=_EXPORT_INTERVAL_MS,
            max_export_batch_size=_MAX_BATCH_SPANS,
        )
    )
    return OtelTracing(provider)


def _context_of(caller: Caller) -> Context:
    """The caller's trace context; an empty one if it sent none, or none that can be read."""
    carrier = {key: value for key, value in caller.invocation_metadata() or () if isinstance(value, str)}
    return _propagator.extract(carrier, Context())


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"baton.{name}": value for name, value in attributes.items()}
