"""What a decode worker measures. The names in `COUNTERS` are those of its status; Prometheus adds the prefix."""

from __future__ import annotations

from common.telemetry.counters import SECONDS_PER_NS, CounterSpec, by_label
from common.telemetry.histogram import INTER_TOKEN_BUCKETS_S, WAIT_BUCKETS_S, Histogram
from common.worker.worker_metrics import REJECT_REASONS, WorkerMetrics
from services.decode.chunk_transfer import OUTCOMES
from services.decode.request import End

PREFIX = "baton_decode_"

END_COUNTERS = {
    End.FINISHED: "sequences_finished",
    End.PREEMPTED: "preemptions",
    End.LOST: "sequences_lost",
    End.DEADLINE: "sequences_expired",
    End.FAILED: "sequences_failed",
    End.CLOSED: "sequences_closed",
}

COUNTERS = {
    "steps": CounterSpec("steps", "Steps planned."),
    "idle_ns": CounterSpec(
        "idle_seconds", "Time in which sequences had rows and the ranks no plan.", (), SECONDS_PER_NS
    ),
    "tokens": CounterSpec("output_tokens", "Tokens that sequences took."),
    "tokens_discarded": CounterSpec("discarded_tokens", "Tokens of sequences that had ended when the step was done."),
    "nonfinite_rows": CounterSpec(
        "nonfinite_rows", "Rows of steps that failed because the model's numbers for them were NaN or infinity."
    ),
    "sequences_opened": CounterSpec("sequences_opened", "Sequences that were registered."),
    "sequences_local": CounterSpec("local_sequences_opened", "Those of them whose prompts are computed here."),
    "local_prompt_tokens": CounterSpec(
        "local_prompt_tokens", "Prompt tokens to be computed here, without cached ones."
    ),
    **by_label(
        "sequences_ended",
        "Sequences that left, by outcome; `preempted` gave way for want of blocks, `closed` on their router's word.",
        "outcome",
        {end.value: name for end, name in END_COUNTERS.items()},
    ),
    "prompt_tokens": CounterSpec(
        "prompt_tokens", "Tokens with which sequences came: prompts, and what moved with them."
    ),
    "lookup_tokens": CounterSpec(
        "prefix_cache_query_tokens", "Tokens, in full blocks, that were looked up in the prefix cache."
    ),
    "cached_tokens": CounterSpec("prefix_cache_hit_tokens", "Tokens that were found in the prefix cache."),
    "blocks_reused": CounterSpec("blocks_reused", "Blocks of opened sequences that were in the prefix cache."),
    "grants": CounterSpec("grants", "Chunks that were granted a slot."),
    "chunks_verified": CounterSpec("chunks_verified", "Chunks that are in KV blocks."),
    "chunks_aborted": CounterSpec("chunks_aborted", "Grants that the sender gave back."),
    **by_label(
        "chunks_rejected",
        "Chunks that were not taken, by reason; `timeout` also when their grant was given back.",
        "reason",
        {reason: f"chunks_rejected_{reason}" for reason in REJECT_REASONS},
    ),
    **by_label(
        "cancelled_receives",
        "Receives that were taken back, by what became of them.",
        "outcome",
        {outcome: f"cancelled_legs_{outcome}" for outcome in OUTCOMES},
    ),
    "slots_quarantined": CounterSpec("slot_quarantines", "Staging slots that were in doubt."),
    "stale_messages": CounterSpec("stale_messages", "Messages that matched no posted receive."),
    "bytes_verified": CounterSpec("transfer_bytes", "Bytes of verified chunks, headers included."),
    "bytes_received": CounterSpec("received_bytes", "Bytes that arrived on the transport, of whatever became of them."),
    "ranks_lost": CounterSpec("ranks_lost", "Incarnations of the ranks that died."),
}


class DecodeMetrics(WorkerMetrics):
    """See `WorkerMetrics`. The queue is that between the last chunk and the first step."""

    def __init__(self) -> None:
        self.step_gap = Histogram("step_gap_seconds", "Result to result while sequences run.", INTER_TOKEN_BUCKETS_S)
        self.verify_duration = Histogram(
            "verify_duration_seconds", "Digest check and scatter of a chunk, on the slowest rank.", WAIT_BUCKETS_S
        )
        super().__init__(PREFIX, COUNTERS, self.step_gap, self.verify_duration)

    def granted(self, waited_ns: int) -> None:
        """A chunk got its slot and its receives."""
        self.inc("grants")
        self.grant_wait.observe(waited_ns * 1e-9)

    def verified(self, num_bytes: int, transfer_ns: int, verify_ns: int) -> None:
        """A chunk is in its blocks."""
        self.inc("chunks_verified")
        self.inc("bytes_verified", num_bytes)
        self.transferred(num_bytes, transfer_ns)
        self.verify_duration.observe(verify_ns * 1e-9)
