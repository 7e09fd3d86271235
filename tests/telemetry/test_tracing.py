"""Spans: whose they are, when they began, what is passed on, and that tracing which is off loads and costs nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode

from common.telemetry.tracing import NO_SPAN, Tracing, open_tracing
from tests.telemetry.spans import (
    SPAN_ID,
    TRACE_ID,
    CallerWith,
    MemoryTracing,
    attribute,
    duration_ns,
    is_child,
    traced_caller,
)


def test_a_span_joins_its_callers_trace_and_passes_it_on() -> None:
    tracing = MemoryTracing()
    span = tracing.begin("request", traced_caller(), 1_000)
    span.child("place", 2_000, 5_000, choice=1)
    span.end(9_000, num_tokens=3)
    request, place = tracing.spans
    assert request.context is not None
    assert request.parent is not None
    assert (request.context.trace_id, request.parent.span_id) == (TRACE_ID, SPAN_ID)
    assert is_child(place, request)
    assert (duration_ns(request), duration_ns(place)) == (8_000, 3_000)
    assert (attribute(place, "choice"), attribute(request, "num_tokens")) == (1, 3)
    assert span.metadata is not None
    assert dict(span.metadata)["traceparent"] == f"00-{TRACE_ID:032x}-{request.context.span_id:016x}-01"


def test_monotonic_times_become_times_of_day() -> None:
    tracing = MemoryTracing()
    now_ns = time.monotonic_ns()
    tracing.begin("request", CallerWith(), now_ns).end(now_ns)
    (span,) = tracing.spans
    assert span.start_time is not None
    assert abs(span.start_time - time.time_ns()) < 20e9


def test_children_hang_under_a_caller_who_ends_his_span_himself() -> None:
    tracing = MemoryTracing()
    parent = tracing.parent(traced_caller())
    assert parent.is_recorded
    parent.child("decode", 1_000, 2_000)
    (decode,) = tracing.spans
    assert decode.parent is not None
    assert decode.parent.span_id == SPAN_ID


def test_a_callers_decision_stands() -> None:
    tracing = MemoryTracing(ParentBased(TraceIdRatioBased(1.0)))
    span = tracing.begin("request", traced_caller(sampled=False), 1_000)
    assert not span.is_recorded
    span.child("place", 1_000, 2_000)
    span.end(3_000)
    assert not tracing.spans
    assert span.metadata is not None
    assert dict(span.metadata)["traceparent"].endswith("-00"), "the workers must not begin traces of their own"
    tracing = MemoryTracing(ParentBased(TraceIdRatioBased(0.0)))
    tracing.begin("request", traced_caller(), 1_000).end(2_000)
    assert len(tracing.spans) == 1


def test_what_is_not_sampled_is_not_recorded_anywhere() -> None:
    tracing = MemoryTracing(ParentBased(ALWAYS_OFF))
    span = tracing.begin("request", CallerWith(), 1_000)
    span.end(2_000)
    assert not tracing.spans
    assert not span.is_recorded
    header = dict(span.metadata or ())["traceparent"]
    assert not MemoryTracing().parent(CallerWith((("traceparent", header),))).is_recorded


def test_a_header_that_cannot_be_read_begins_a_new_trace() -> None:
    tracing = MemoryTracing()
    for header in ("", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 10_000):
        tracing.begin("request", CallerWith((("traceparent", header),)), 1_000).end(2_000)
    assert all(span.parent is None for span in tracing.spans)
    assert len({span.context.trace_id for span in tracing.spans if span.context is not None}) == 4


def test_a_failed_span_says_so_and_what_never_began_is_left_out() -> None:
    tracing = MemoryTracing()
    span = tracing.begin("request", CallerWith(), 1_000)
    span.child("queue", 0, 5_000)
    span.end(2_000, "DeadlineExceeded")
    (request,) = tracing.spans
    assert request.status.status_code is StatusCode.ERROR
    assert request.status.description == "DeadlineExceeded"


def test_tracing_is_off_without_an_endpoint_and_loads_nothing() -> None:
    tracing = open_tracing("", 1.0, "router", "r")
    assert type(tracing) is Tracing
    assert tracing.begin("request", traced_caller(), 1) is tracing.parent(traced_caller()) is NO_SPAN
    assert NO_SPAN.metadata is None
    code = (
        "import sys, services.router.process, services.prefill.server, services.decode.server\n"
        "from common.telemetry.tracing import open_tracing\n"
        "open_tracing('', 1.0, 'router', 'r')\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_collector_that_is_gone_holds_nobody_up() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and never listens
        tracing = open_tracing(f"http://127.0.0.1:{probe.getsockname()[1]}", 1.0, "router", "r")
        started_s = time.monotonic()
        for _ in range(100):
            tracing.begin("request", CallerWith(), 1_000).end(2_000)
        closing_s = time.monotonic()
        assert closing_s - started_s < 20.0
        tracing.close(timeout_s=0.2)
        assert time.monotonic() - closing_s < 4.0
