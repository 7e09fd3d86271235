"""What both kinds of workers measure: steps, waits and transfers, and gauges that are read from their status.

Each worker adds its own counters and histograms. Knows no service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from baton.v1 import kv_pb2, worker_pb2

from common.telemetry.counters import CounterSpec
from common.telemetry.histogram import ROW_BUCKETS, STEP_BUCKETS_S, TOKEN_BUCKETS, WAIT_BUCKETS_S, Histogram
from common.telemetry.metrics import GaugeSpec, Level, Metrics
from common.telemetry.recent_rate import RecentRate


def reject_reason(reason: kv_pb2.ChunkRejectReason.ValueType) -> str:
    """The name of a reason, as labels have it."""
    if reason not in kv_pb2.ChunkRejectReason.values():
        reason = kv_pb2.CHUNK_REJECT_REASON_UNSPECIFIED  # a peer's word: it must not make up names
    return kv_pb2.ChunkRejectReason.Name(reason).removeprefix("CHUNK_REJECT_REASON_").lower()


REJECT_REASONS = tuple(reject_reason(reason) for reason in kv_pb2.ChunkRejectReason.values())

WORKER_GAUGES: Mapping[str, GaugeSpec] = {
    "ready": GaugeSpec("Whether new requests are taken: 1 or 0."),
    "requests_waiting": GaugeSpec("Requests that wait for compute."),
    "requests_running": GaugeSpec("Requests that are being computed."),
    "waiting_tokens": GaugeSpec("Prompt tokens that no step has yet."),
    "blocks": GaugeSpec("KV blocks by state; the states add up to the pool.", "state"),
    "slots": GaugeSpec("Staging slots by state; the states add up to all slots.", "state"),
    "grants_waiting": GaugeSpec("Chunks that wait for a grant."),
    "transfer_rate_bytes_per_second": GaugeSpec("Rate of the last few transfers of KV blocks."),
}


class WorkerMetrics(Metrics):
    """Counters by name; histograms, and what some gauges are read from, as attributes."""

    def __init__(self, prefix: str, counters: Mapping[str, CounterSpec], *more: Histogram) -> None:
        self.step_duration = Histogram("step_duration_seconds", "Forward and sampling on rank 0.", STEP_BUCKETS_S)
        self.step_rows = Histogram("step_rows", "Rows of a step.", ROW_BUCKETS)
        self.step_tokens = Histogram("step_tokens", "Input tokens of a step.", TOKEN_BUCKETS)
        self.queue_wait = Histogram("queue_wait_seconds", "Ready to be computed to first step.", WAIT_BUCKETS_S)
        self.grant_wait = Histogram("grant_wait_seconds", "Chunk offered to granted.", WAIT_BUCKETS_S)
        self.transfer_duration = Histogram(
            "transfer_duration_seconds", "Chunk granted to bytes complete, of those that arrived.", WAIT_BUCKETS_S
        )
        self.transfer_rate = RecentRate()
        common = (self.step_duration, self.step_rows, self.step_tokens, self.queue_wait)
        super().__init__(prefix, counters, (*common, self.grant_wait, self.transfer_duration, *more))

    def watch(self, status: Callable[[], worker_pb2.WorkerStatus]) -> None:
        """Read the gauges from here whenever somebody scrapes, on the scraping thread."""
        self.set_gauges(WORKER_GAUGES, lambda: self._levels(status()))

    def transferred(self, num_bytes: int, duration_ns: int) -> None:
        """A chunk arrived. (Its bytes are counted by the service, under a name of its own.)"""
        self.transfer_duration.observe(duration_ns * 1e-9)
        self.transfer_rate.add(num_bytes, duration_ns)

    def _levels(self, status: worker_pb2.WorkerStatus) -> dict[str, Level]:
        return {
            "ready": float(status.state == worker_pb2.WORKER_STATE_READY),
            "requests_waiting": status.num_waiting,
            "requests_running": status.num_running,
            "waiting_tokens": status.num_waiting_tokens,
            "blocks": {
                "free": status.num_blocks_free,
                "cached": status.num_blocks_cached,
                "held": status.num_blocks_held,
            },
            "slots": {
                "free": status.num_slots_free,
                "in_use": status.num_slots_in_use,
                "quarantined": status.num_slots_quarantined,
            },
            "grants_waiting": status.num_grants_waiting,
            "transfer_rate_bytes_per_second": self.transfer_rate.bytes_per_s,
        }
