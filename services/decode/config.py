"""The decode worker's settings. Defaults are those of a single machine; every field explains itself in `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import ServiceConfig
from services.decode.handoff import HandoffLimits

_SLOT_ALIGNMENT_BYTES = 64  # legs start at multiples of the element size


class DecodeConfig(ServiceConfig):
    """The decode worker: receives KV caches from prefill workers and produces tokens."""

    service: ClassVar[str] = "decode"

    worker_id: str = Field("decode-0", pattern=r"^[\x21-\x7e]{1,64}$", description="Name, unique in the deployment.")
    listen: str = Field("0.0.0.0:50071", description="host:port for routers and prefill workers.")
    advertise: str = Field("", description="host:port in tickets, for prefill workers; the listen address if empty.")
    model: Path = Field(description="Checkpoint directory (config.json and safetensors).")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the ranks compute; rank i takes device i.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16: weights, activations, KV cache.")
    tp_size: int = Field(1, ge=1, le=64, description="Tensor-parallel ranks.")

    num_blocks: int = Field(1024, ge=1, description="KV blocks of each rank, unless kv_bytes says how many.")
    kv_bytes: int = Field(0, ge=0, description="Memory of each rank for KV blocks, bytes; 0: see num_blocks.")
    block_size: int = Field(64, ge=1, description="Tokens in a block; prefill workers must have the same.")
    prefix_cache: bool = Field(True, description="Keep the blocks of ended sequences for those that start alike.")

    max_rows: int = Field(64, ge=1, description="Sequences that decode at once.")
    max_open: int = Field(512, ge=1, description="Sequences in all states; more are refused.")

    transport_url: str = Field("ucx://0.0.0.0:0", description="Where the ranks listen; the host is told to peers.")
    transport_progress: Literal["event", "polling"] = Field("event", description="How the transport is driven.")
    num_slots: int = Field(4, ge=1, le=256, description="Staging slots of each rank for receiving.")
    slot_bytes: int = Field(8 << 20, ge=4096, description="Size of a staging slot, bytes.")
    grant_timeout_s: float = Field(5.0, gt=0, description="Time for the bytes of one chunk, seconds.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Time for a prefill rank to connect, seconds.")
    cancel_timeout_s: float = Field(0.5, gt=0, description="After this a receive under way is in doubt, seconds.")
    max_waiting_chunks: int = Field(4096, ge=1, description="Chunks that may wait for a staging slot.")

    max_message_bytes: int = Field(16 << 20, ge=1 << 16, description="Largest gRPC message, bytes.")
    start_timeout_s: float = Field(300.0, gt=0, description="Time for the ranks to load and be ready, seconds.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Time for sequences under way after SIGTERM, seconds.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0 is off.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.slot_bytes % _SLOT_ALIGNMENT_BYTES:
            raise ValueError(f"slot_bytes must be a multiple of {_SLOT_ALIGNMENT_BYTES}")
        return self

    @property
    def handoff_limits(self) -> HandoffLimits:
        """The hand-off's part."""
        return HandoffLimits(
            grant_timeout_s=self.grant_timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            cancel_timeout_s=self.cancel_timeout_s,
            max_waiting_chunks=self.max_waiting_chunks,
        )
