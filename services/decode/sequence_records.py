"""What is known of the sequences that are open, for when they end: spans, a line in the log, and how long they waited.

Made from the times that the scheduler notes anyway. Decides nothing.
"""

from __future__ import annotations

import time

from common.telemetry.request_log import RequestLog, milliseconds
from common.telemetry.tracing import NO_SPAN, Span
from services.decode.metrics import DecodeMetrics
from services.decode.request import DecodeSequence, End, Key, PromptComputed, SequenceEnded, StepsBegin

_log = RequestLog("decode")


class SequenceRecords:
    """One record for each open sequence."""

    def __init__(self, metrics: DecodeMetrics) -> None:
        self._metrics = metrics
        self._open: dict[Key, tuple[DecodeSequence, Span]] = {}

    def opened(self, seq: DecodeSequence, block_size: int, span: Span = NO_SPAN) -> None:
        """A sequence was registered; `span` is its request's."""
        self._open[seq.key] = (seq, span)
        metrics = self._metrics
        metrics.inc("sequences_opened")
        metrics.inc("blocks_reused", seq.blocks.num_cached_blocks)
        metrics.inc("prompt_tokens", seq.num_handoff_tokens)
        metrics.inc("lookup_tokens", len(seq.hashes) * block_size)
        metrics.inc("cached_tokens", seq.blocks.num_cached_blocks * block_size)

    def began(self, event: StepsBegin | PromptComputed) -> None:
        """The first step of a sequence that was handed off begins, or the prompt of a local one is computed."""
        if isinstance(event, PromptComputed):
            self._metrics.queue_wait.observe(event.queue_ns * 1e-9)
        elif (entry := self._open.get(event.key)) is not None:
            self._metrics.queue_wait.observe(entry[0].first_step_s - entry[0].joined_s)

    def ended(self, event: SequenceEnded) -> None:
        """A sequence left."""
        entry = self._open.pop(event.key, None)
        if entry is None:
            return
        seq, span = entry
        if span.is_recorded:
            _add_children(seq, span, event)
        if _log.is_on:
            _write(seq, event)


def _add_children(seq: DecodeSequence, span: Span, event: SequenceEnded) -> None:
    worked_s = seq.scheduled_s if seq.is_local else seq.first_step_s
    ready_s = seq.opened_s if seq.is_local else seq.joined_s
    if worked_s:
        span.child("queue", _ns(ready_s), _ns(worked_s))
    if seq.is_local and seq.joined_s:
        span.child("local_prefill", _ns(seq.scheduled_s), _ns(seq.joined_s), num_tokens=seq.num_handoff_tokens)
    if seq.first_step_s:
        span.child(
            "decode", _ns(seq.first_step_s), _ns(seq.last_token_s), num_tokens=seq.num_stepped, outcome=event.end.value
        )


def _write(seq: DecodeSequence, event: SequenceEnded) -> None:
    _log.write(
        seq.request.request_id,
        "ok" if event.end is End.FINISHED else event.end.value,
        detail=event.error,
        sequence_id=seq.request.sequence_id,
        prompt_tokens=seq.num_handoff_tokens,
        output_tokens=seq.num_stepped,
        blocks_reused=seq.blocks.num_cached_blocks,
        decode_queue_ms=milliseconds(event.decode_queue_ns),
        decode_ms=milliseconds(event.decode_ns),
        total_ms=milliseconds(time.monotonic_ns() - _ns(seq.opened_s)),
        is_local=seq.is_local,
    )


def _ns(at_s: float) -> int:
    return round(at_s * 1e9)
