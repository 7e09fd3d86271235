"""What is known of one call while it runs and when it ends: its spans, its line in the log, and what is counted of it.

Touched a few times per request, never per token. Decides nothing.
"""

from __future__ import annotations

import time

from common.rpc.status import find_baton_error
from common.telemetry.request_log import Field, RequestLog, milliseconds
from common.telemetry.tracing import NO_SPAN, Metadata, Span
from services.router.metrics import OK, RouterMetrics, outcome_of
from services.router.output_stream import OutputStream

_log = RequestLog("router")


class RequestRecord:
    """One call. `finish` it, however it ends."""

    def __init__(self, metrics: RouterMetrics, received_ns: int, span: Span = NO_SPAN) -> None:
        self.received_ns = received_ns
        self.request_id = ""
        self.num_prompt_tokens = 0
        self.output: OutputStream | None = None
        self._metrics = metrics
        self._span = span

    @property
    def traceparent(self) -> str:
        """Of messages to workers on behalf of the request."""
        return self._span.traceparent

    @property
    def metadata(self) -> Metadata | None:
        """Of calls to workers on behalf of the request."""
        return self._span.metadata

    def admitted(self, now_ns: int) -> None:
        """It has its place."""
        self._metrics.queue_wait.observe((now_ns - self.received_ns) * 1e-9)
        self._span.child("admit", self.received_ns, now_ns)

    def tokenized(self, start_ns: int, end_ns: int, num_prompt_tokens: int) -> None:
        """The prompt is token ids."""
        self.num_prompt_tokens = num_prompt_tokens
        self._metrics.tokenize_duration.observe((end_ns - start_ns) * 1e-9)
        self._span.child("tokenize", start_ns, end_ns, num_prompt_tokens=num_prompt_tokens)

    def placed(self, choice: int, start_ns: int, prefill: str, decode: str) -> None:
        """Workers were found for an attempt."""
        now_ns = time.monotonic_ns()
        self._metrics.placement_wait.observe((now_ns - start_ns) * 1e-9)
        self._span.child("place", start_ns, now_ns, choice=choice, prefill_worker=prefill, decode_worker=decode)

    def opened(self, choice: int, start_ns: int, decode: str) -> None:
        """A decode worker registered a sequence."""
        self._span.child("open", start_ns, time.monotonic_ns(), choice=choice, decode_worker=decode)

    def finish(self, error: BaseException | None) -> None:
        """The call is over; with `error` that is what ended it."""
        now_ns = time.monotonic_ns()
        outcome = OK if error is None else outcome_of(error, find_baton_error(error))
        choices = self.output.choices if self.output is not None else []
        num_output_tokens = sum(len(choice.tokens) for choice in choices)
        num_migrations = sum(choice.lifetime.num_migrations for choice in choices)
        self._count(outcome, now_ns, num_output_tokens, num_migrations)
        counts: dict[str, int] = {
            "choices": len(choices),
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": num_output_tokens,
            "migrations": num_migrations,
        }
        self._span.end(now_ns, "" if error is None else outcome, request_id=self.request_id, outcome=outcome, **counts)
        if _log.is_on:
            times = {"first_token_ms": self._first_token_ms(), "total_ms": milliseconds(now_ns - self.received_ns)}
            _log.write(self.request_id, outcome, **counts, **times, **self._lifetime())

    def _count(self, outcome: str, now_ns: int, num_output_tokens: int, num_migrations: int) -> None:
        metrics, output = self._metrics, self.output
        metrics.inc(f"requests_{outcome}")
        metrics.inc("prompt_tokens", self.num_prompt_tokens)
        metrics.inc("output_tokens", num_output_tokens)
        metrics.inc("migrations", num_migrations)
        metrics.request_duration.observe((now_ns - self.received_ns) * 1e-9)
        if output is not None:
            metrics.inc("messages", output.num_messages)
            if output.first_token_ns is not None:
                metrics.first_token.observe((output.first_token_ns - self.received_ns) * 1e-9)

    def _first_token_ms(self) -> float | None:
        output = self.output
        if output is None or output.first_token_ns is None:
            return None
        return milliseconds(output.first_token_ns - self.received_ns)

    def _lifetime(self) -> dict[str, Field]:
        """Where the first choice's time went, as its client is told."""
        if self.output is None or not self.output.choices:
            return {}
        lifetime = self.output.choices[0].lifetime
        fields: dict[str, Field] = {}
        for name in ("queue", "prefill", "grant", "transfer", "verify", "decode_queue", "decode"):
            fields[f"{name}_ms"] = milliseconds(getattr(lifetime, f"{name}_ns"))
        fields["prefill_worker"], fields["decode_worker"] = lifetime.prefill_worker, lifetime.decode_worker
        fields["transport"] = lifetime.transport
        return fields
