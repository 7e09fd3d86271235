"""The prefill worker's settings. Defaults are those of a single machine; every field explains itself in `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import ServiceConfig
from services.prefill.admission import SchedulerLimits

_SLOT_ALIGNMENT_BYTES = 64  # legs start at multiples of the element size


class PrefillConfig(ServiceConfig):
    """The prefill worker: computes KV caches and hands them to decode workers."""

    service: ClassVar[str] = "prefill"

    worker_id: str = Field("prefill-0", pattern=r"^[\x21-\x7e]{1,64}$", description="Name, unique in the deployment.")
    listen: str = Field("0.0.0.0:50061", description="host:port for routers.")
    model: Path = Field(description="Checkpoint directory (config.json and safetensors).")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the ranks compute; rank i takes device i.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16: weights, activations, KV cache.")
    tp_size: int = Field(1, ge=1, le=64, description="Tensor-parallel ranks.")

    num_blocks: int = Field(1024, ge=1, description="KV blocks of each rank, unless kv_bytes says how many.")
    kv_bytes: int = Field(0, ge=0, description="Memory of each rank for KV blocks, bytes; 0: see num_blocks.")
    block_size: int = Field(64, ge=1, description="Tokens in a block; decode workers must have the same.")
    prefix_cache: bool = Field(True, description="Keep the blocks of finished prompts for prompts that start alike.")

    max_step_tokens: int = Field(2048, ge=2, description="Tokens of one step; at least two blocks.")
    max_rows: int = Field(64, ge=1, description="Prompts that are computed at once.")
    max_waiting: int = Field(512, ge=1, description="Prompts that may wait; more are refused.")
    policy: Literal["shortest-remaining", "first-come"] = Field(
        "shortest-remaining", description="Whose chunks come first."
    )
    oldest_share: float = Field(
        0.25, gt=0, le=0.5, description="Share of each step's tokens that the oldest prompt gets in any case."
    )
    max_overtakes: int = Field(
        32, ge=0, description="Later prompts that may be admitted before one that finds too few blocks."
    )

    transport_url: str = Field("ucx://0.0.0.0:0", description="Where the ranks open their transport endpoints.")
    transport_progress: Literal["event", "polling"] = Field("event", description="How the transport is driven.")
    num_slots: int = Field(4, ge=1, le=256, description="Staging slots of each rank for sending.")
    slot_bytes: int = Field(8 << 20, ge=4096, description="Size of a staging slot, bytes.")
    max_chunks_in_flight: int = Field(2, ge=1, le=16, description="Chunks of one hand-off that travel at once.")
    max_chunk_resends: int = Field(3, ge=0, description="How often one chunk is offered again after it failed.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Time to connect to a decode rank, seconds.")
    max_idle_channels: int = Field(64, ge=0, description="Unused gRPC channels to decode workers that stay open.")

    max_message_bytes: int = Field(16 << 20, ge=1 << 16, description="Largest gRPC message, bytes.")
    start_timeout_s: float = Field(300.0, gt=0, description="Time for the ranks to load and be ready, seconds.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Time for requests under way after SIGTERM, seconds.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0 is off.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")
    corrupt_every: int = Field(
        0, ge=0, description="For tests: flip a bit in every n-th leg after its digest was computed; 0 is never."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_step_tokens < 2 * self.block_size:
            raise ValueError(f"max_step_tokens must be at least two blocks of {self.block_size} tokens")
        if self.slot_bytes % _SLOT_ALIGNMENT_BYTES:
            raise ValueError(f"slot_bytes must be a multiple of {_SLOT_ALIGNMENT_BYTES}")
        return self

    @property
    def scheduler_limits(self) -> SchedulerLimits:
        """The scheduler's part."""
        return SchedulerLimits(
            max_rows=self.max_rows,
            max_step_tokens=self.max_step_tokens,
            max_waiting=self.max_waiting,
            policy=self.policy,
            oldest_share=self.oldest_share,
            max_overtakes=self.max_overtakes,
        )
