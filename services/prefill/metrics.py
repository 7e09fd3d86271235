"""What a prefill worker measures. The names in `COUNTERS` are those of its status; Prometheus adds the prefix."""

from __future__ import annotations

from collections.abc import Callable

from baton.v1 import kv_pb2, worker_pb2

from common.telemetry.counters import SECONDS_PER_NS, CounterSpec, by_label
from common.telemetry.lanes import LaneUse, lane_counters
from common.telemetry.metrics import GaugeSpec
from common.worker.worker_metrics import REJECT_REASONS, WORKER_GAUGES, WorkerMetrics, reject_reason

PREFIX = "baton_prefill_"

COUNTERS = {
    "steps": CounterSpec("steps", "Steps computed."),
    "idle_ns": CounterSpec(
        "idle_seconds", "Time in which prompts waited and the ranks had no plan.", (), SECONDS_PER_NS
    ),
    "prompt_tokens": CounterSpec("prompt_tokens", "Tokens of admitted prompts."),
    "output_tokens": CounterSpec("output_tokens", "First tokens that were sampled."),
    "lookup_tokens": CounterSpec(
        "prefix_cache_query_tokens", "Tokens, in full blocks, that were looked up in the prefix cache."
    ),
    "cached_tokens": CounterSpec("prefix_cache_hit_tokens", "Tokens that were found in the prefix cache."),
    **by_label(
        "requests",
        "Prefill calls that ended, by outcome; `refused` before anything was computed.",
        "outcome",
        {outcome: f"requests_{outcome}" for outcome in ("completed", "failed", "cancelled", "refused")},
    ),
    "nonfinite_rows": CounterSpec(
        "nonfinite_rows", "Rows of steps that failed because the model's numbers for them were NaN or infinity."
    ),
    "grants": CounterSpec("grants", "Chunks that a decode worker granted."),
    "blocks_shipped": CounterSpec("blocks_shipped", "Blocks that decode workers verified."),
    "blocks_reused": CounterSpec("blocks_reused", "Blocks that decode workers held already."),
    "bytes_shipped": CounterSpec("transfer_bytes", "Bytes of granted chunks, headers and repetitions included."),
    "chunks_resent": CounterSpec("chunks_resent", "Chunks that were offered again."),
    **by_label(
        "chunks_rejected",
        "Chunks that decode workers did not take, by reason.",
        "reason",
        {reason: f"chunks_rejected_{reason}" for reason in REJECT_REASONS},
    ),
    **lane_counters(),
    "slots_quarantined": CounterSpec("slot_quarantines", "Send slots whose last send was in doubt."),
    "ranks_lost": CounterSpec("ranks_lost", "Incarnations of the ranks that died."),
}


class PrefillMetrics(WorkerMetrics):
    """See `WorkerMetrics`. Rows are prompts with a chunk in the step; the queue is the scheduler's."""

    def __init__(self) -> None:
        super().__init__(PREFIX, COUNTERS)
        self.num_offered = 0  # chunks that wait for a grant now
        self.lanes = LaneUse(self)

    def granted(self, waited_ns: int) -> None:
        """A decode worker granted a chunk."""
        self.inc("grants")
        self.grant_wait.observe(waited_ns * 1e-9)

    def verified(self, num_bytes: int, transfer_ns: int, lane: str) -> None:
        """A decode worker has a chunk in its blocks."""
        self.transferred(num_bytes, transfer_ns)
        self.lanes.count(lane)

    def rejected(self, reason: kv_pb2.ChunkRejectReason.ValueType) -> None:
        """A decode worker did not take a chunk."""
        self.inc(f"chunks_rejected_{reject_reason(reason)}")

    def watch(self, status: Callable[[], worker_pb2.WorkerStatus]) -> None:
        specs = {**WORKER_GAUGES, "lane_info": GaugeSpec("1 for the lane that the last chunk took, by lane.", "lane")}
        self.set_gauges(specs, lambda: {**self._levels(status()), "lane_info": self.lanes.levels})
