"""What is known of one Prefill call: its spans, its line in the log, and its outcome.

Made from times that are taken anyway. Decides nothing.
"""

from __future__ import annotations

import asyncio
import time

from common import errors
from common.telemetry.request_log import RequestLog, milliseconds
from common.telemetry.tracing import Metadata, Span
from services.prefill.engine import PrefillJob
from services.prefill.handoff_stats import HandoffStats
from services.prefill.metrics import PrefillMetrics

_log = RequestLog("prefill")
_REFUSALS = (errors.ResourceExhausted, errors.InvalidArgument, errors.FailedPrecondition)


class PrefillRecord:
    """One call. `job` and `stats` are set as soon as they exist; `finish` it, however it ends."""

    def __init__(self, metrics: PrefillMetrics, request_id: str, received_ns: int, span: Span) -> None:
        self.job: PrefillJob | None = None
        self.stats = HandoffStats()
        self.completed_ns = 0  # all is done, and being written: a caller who hangs up now has what he wanted
        self._metrics = metrics
        self._request_id = request_id
        self._received_ns = received_ns
        self._span = span

    @property
    def metadata(self) -> Metadata | None:
        """Of the Handoff call."""
        return self._span.metadata

    def finish(self, error: BaseException | None) -> None:
        """The call is over; with `error` that is what ended it."""
        if self.completed_ns and isinstance(error, asyncio.CancelledError):
            error = None
        outcome = "ok" if error is None else type(error).__name__
        if isinstance(error, Exception):
            self._metrics.inc("requests_refused" if isinstance(error, _REFUSALS) else "requests_failed")
        elif error is not None:
            outcome = errors.Cancelled.__name__
            self._metrics.inc("requests_cancelled")
        else:
            self._metrics.inc("requests_completed")
        ended_ns = self.completed_ns or time.monotonic_ns()
        if self._span.is_recorded:
            self._add_children()
        self._span.end(ended_ns, "" if error is None else outcome, request_id=self._request_id, outcome=outcome)
        if _log.is_on:
            self._write(outcome, "" if error is None else str(error), ended_ns)

    def _add_children(self) -> None:
        job = self.job
        if job is not None and job.scheduled_ns:
            self._span.child("queue", job.received_ns, job.scheduled_ns, num_cached_tokens=job.num_cached_tokens)
            for chunk in job.chunks:
                # The rank's time and ours are rounded differently; a chunk never begins before it was planned.
                start_ns = max(chunk.start_ns, job.scheduled_ns)
                num_blocks = chunk.end_block - chunk.first_block
                self._span.child("chunk", start_ns, chunk.end_ns, first_block=chunk.first_block, num_blocks=num_blocks)
        for sent in self.stats.shipments:
            self._span.child(
                "transfer",
                sent.begun_ns or sent.offered_ns,
                sent.ended_ns,
                chunk=sent.chunk_index,
                num_blocks=sent.shape.num_blocks,
                num_layers=sent.shape.num_layers,
                num_bytes=sent.num_bytes,
                grant_wait_ns=sent.granted_ns - sent.offered_ns if sent.granted_ns else 0,
                lane=self.stats.transport,
                is_verified=sent.is_verified,
            )

    def _write(self, outcome: str, detail: str, ended_ns: int) -> None:
        job, stats = self.job, self.stats
        queue_ns = prefill_ns = num_tokens = num_cached_tokens = 0
        if job is not None:
            num_tokens, num_cached_tokens = job.prompt.num_tokens, job.num_cached_tokens
            queue_ns = job.scheduled_ns - job.received_ns if job.scheduled_ns else 0
            prefill_ns = job.sampled_ns - job.scheduled_ns if job.sampled_ns else 0
        _log.write(
            self._request_id,
            outcome,
            detail=detail,
            prompt_tokens=num_tokens,
            cached_tokens=num_cached_tokens,
            queue_ms=milliseconds(queue_ns),
            prefill_ms=milliseconds(prefill_ns),
            grant_ms=milliseconds(stats.grant_ns),
            transfer_ms=milliseconds(max(0, stats.transfer_ns)),
            verify_ms=milliseconds(stats.verify_ns),
            exposed_ms=milliseconds(stats.exposed_ns),
            total_ms=milliseconds(ended_ns - self._received_ns),
            blocks_shipped=stats.num_blocks_shipped,
            blocks_reused=stats.num_blocks_reused,
            bytes_shipped=stats.bytes_shipped,
            chunks_resent=stats.num_chunks_resent,
            transport=stats.transport,
        )
