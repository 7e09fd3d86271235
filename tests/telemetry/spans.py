"""Tracing into memory, and callers that come with a trace or without one."""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler

from common.telemetry.otel import OtelTracing

TRACE_ID = 0xABCDEF0123456789ABCDEF0123456789
SPAN_ID = 0x1234567890ABCDEF


@dataclass(frozen=True, slots=True)
class CallerWith:
    """A call that came with this metadata."""

    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata


def traced_caller(sampled: bool = True) -> CallerWith:
    """A caller with a trace of its own."""
    header = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-{sampled:02x}"
    return CallerWith((("user-agent", "x"), ("key-bin", b"\x00"), ("traceparent", header)))


class MemoryTracing(OtelTracing):
    """Keeps the spans that ended."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler or ParentBased(ALWAYS_ON), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        super().__init__(provider)

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order of their begin."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of this name."""
        return [span for span in self.spans if span.name == name]


def start_ns(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return span.start_time


def end_ns(span: ReadableSpan) -> int:
    assert span.end_time is not None
    return span.end_time


def duration_ns(span: ReadableSpan) -> int:
    return end_ns(span) - start_ns(span)


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """Whether `span` hangs under `parent` and is within its time."""
    if span.parent is None or parent.context is None or span.parent.span_id != parent.context.span_id:
        return False
    return start_ns(parent) <= start_ns(span) <= end_ns(span) <= end_ns(parent)


def attribute(span: ReadableSpan, name: str) -> object:
    """One of our own."""
    assert span.attributes is not None
    return span.attributes[f"baton.{name}"]
