"""The settings that prefill and decode workers share; each adds its own, with defaults for a single machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from common.config import Address, ServiceConfig, split_address
from common.errors import InvalidArgument
from common.kvcache.layout import heads_of_rank
from common.loop_watchdog import MAX_STANDSTILL_S
from common.message_bounds import MAX_RANKS
from common.telemetry.tracing import OTLP_ENDPOINT_HELP, TRACE_SAMPLE_RATIO_HELP
from common.worker.kv_address import default_transport_url, rank_urls
from common.worker.worker_model import WorkerModel, read_worker_model

_SLOT_ALIGNMENT_BYTES = 64  # legs start at multiples of the element size
_GPU_SLOT_BYTES = (64 << 20) + 4096  # 64 MiB and headers
_GPU_NUM_SLOTS = 8  # two hand-offs with all chunks that travel at once


class WorkerConfig(ServiceConfig):
    """Base of a worker's configuration."""

    worker_id: str = Field(pattern=r"^[\x21-\x7e]{1,64}$", description="Name, unique in the deployment.")
    listen: Address = Field(description="host:port for those who call this worker.")
    model: Path = Field(description="Checkpoint directory (config.json and safetensors).")
    random_weights: bool = Field(
        False, description="Draw the weights instead of reading them: for measurements; config.json is enough."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the ranks compute.")
    first_device: int = Field(0, ge=0, description="On GPUs, rank i takes the device with this number plus i.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16: weights, activations, KV cache.")
    tp_size: int = Field(1, ge=1, le=MAX_RANKS, description="Tensor-parallel ranks.")

    num_blocks: int = Field(1024, ge=1, description="KV blocks of each rank, unless kv_bytes says how many.")
    kv_bytes: int = Field(0, ge=0, description="Memory of each rank for KV blocks, bytes; 0: see num_blocks.")
    block_size: int = Field(64, ge=1, description="Tokens in a block; the same in prefill and decode workers.")
    prefix_cache: bool = Field(True, description="Keep the blocks of what has ended for what starts alike.")
    max_rows: int = Field(64, ge=1, description="Sequences that are computed at once.")

    transport_url: str = Field(
        "",
        pattern="^$|^(ucx|nccl|inproc)://",
        description="Where the ranks of a decode worker listen for KV bytes, and what a prefill worker's connect from: "
        "ucx://host:port or nccl://host:port. Rank r takes port + r, or any if it is 0. "
        "Empty: ucx on the host of listen, any port.",
    )
    transport_progress: Literal["auto", "event", "polling"] = Field(
        "auto", description="How the transport is driven; auto is polling on GPUs, whose copies raise no event."
    )
    num_slots: int = Field(4, ge=1, le=256, description="Staging slots of each rank [on GPUs: 8].")
    slot_bytes: int = Field(8 << 20, ge=4096, description="Size of a staging slot, bytes [on GPUs: 64 MiB].")
    connect_timeout_s: float = Field(5.0, gt=0, description="Time for two ranks to connect, seconds.")
    max_chunk_resends: int = Field(3, ge=0, description="How often one chunk is offered again after it failed.")

    max_message_bytes: int = Field(16 << 20, ge=1 << 16, description="Largest gRPC message, bytes.")
    start_timeout_s: float = Field(300.0, gt=0, description="Time for the ranks to load and be ready, seconds.")
    step_timeout_s: float = Field(
        60.0, gt=0, description="Time of one step, after which the ranks count as hung and are replaced, seconds."
    )
    drain_timeout_s: float = Field(30.0, ge=0, description="Time for what is under way after SIGTERM, seconds.")
    max_standstill_s: float = Field(
        MAX_STANDSTILL_S, ge=0, description="Standstill of the event loop after which the process ends; 0 is never."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0 is off.")
    metrics_host: str = Field("", description="Where it is served; the host of listen if empty.")
    otlp_endpoint: str = Field("", description=OTLP_ENDPOINT_HELP)
    trace_sample_ratio: float = Field(1.0, ge=0, le=1, description=TRACE_SAMPLE_RATIO_HELP)
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")

    @model_validator(mode="before")
    @classmethod
    def _enlarge_slots(cls, values: dict[str, object]) -> dict[str, object]:
        """NVLink and RDMA are fast with messages of tens of MiB only: see docs/performance.md."""
        if values.get("device") == "cuda":
            return {"slot_bytes": _GPU_SLOT_BYTES, "num_slots": _GPU_NUM_SLOTS, **values}
        return values

    @model_validator(mode="after")
    def _check_slots(self) -> Self:
        if self.slot_bytes % _SLOT_ALIGNMENT_BYTES:
            raise ValueError(f"slot_bytes must be a multiple of {_SLOT_ALIGNMENT_BYTES}")
        return self

    @model_validator(mode="after")
    def _check_transport_url(self) -> Self:
        try:
            rank_urls(self.kv_url, self.tp_size)
        except InvalidArgument as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def kv_url(self) -> str:
        """`transport_url`, or what it is by default."""
        return self.transport_url or default_transport_url(self.listen)

    @property
    def metrics_address(self) -> str:
        """`metrics_host`, or what it is by default."""
        return self.metrics_host or split_address(self.listen)[0]

    @property
    def progress(self) -> str:
        """`transport_progress`, with `auto` resolved."""
        if self.transport_progress != "auto":
            return self.transport_progress
        return "polling" if self.device == "cuda" else "event"

    def read_model(self) -> WorkerModel:
        """The model that is served. Raises what `read_worker_model` raises."""
        return read_worker_model(
            self.model, self.device, self.dtype, self.block_size, self.tp_size, self.random_weights
        )

    def num_blocks_of(self, model: WorkerModel) -> int:
        """KV blocks of each rank. Raises `InvalidArgument` if `kv_bytes` has no room for one."""
        if not self.kv_bytes:
            return self.num_blocks
        block_bytes = model.layout.block_bytes(self._num_heads(model))
        if self.kv_bytes < block_bytes:
            raise InvalidArgument("kv_bytes", self.kv_bytes, f"a block has {block_bytes} bytes")
        return self.kv_bytes // block_bytes

    def check_slots(self, model: WorkerModel) -> None:
        """Raises `InvalidArgument` if not even one layer of a block fits into a slot, so that nothing can travel."""
        num_heads = self._num_heads(model)
        if model.layout.max_layer_blocks_per_slot(self.slot_bytes, num_heads) < 1:
            layer_bytes = model.layout.layer_block_bytes(num_heads)
            limit = f"one layer of a block has {layer_bytes} bytes, and a header"
            raise InvalidArgument("slot_bytes", self.slot_bytes, limit)

    def _num_heads(self, model: WorkerModel) -> int:
        """KV heads of a rank."""
        return len(heads_of_rank(model.layout.num_kv_heads, self.tp_size, 0))
