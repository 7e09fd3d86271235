"""The prefill worker's settings. Defaults are those of a single machine; every field explains itself in `--help`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import FOR_TESTS, Address
from common.worker.worker_config import WorkerConfig
from services.prefill.admission import SchedulerLimits


class PrefillConfig(WorkerConfig):
    """The prefill worker: computes KV caches and hands them to decode workers."""

    service: ClassVar[str] = "prefill"

    worker_id: str = Field("prefill-0", pattern=r"^[\x21-\x7e]{1,64}$", description="Name, unique in the deployment.")
    listen: Address = Field("127.0.0.1:50061", description="host:port for routers.")

    max_step_tokens: int = Field(2048, ge=2, description="Tokens of one step; at least two blocks.")
    capture_tokens: int = Field(
        512, ge=0, le=2048, description="On GPUs: capture steps of up to so many tokens, as hosts launch slowly."
    )
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
    last_chunk_bytes: int = Field(
        16 << 20, ge=1, description="Size of the last chunk that a step sends, about; those before it fill a slot."
    )
    max_chunks_in_flight: int = Field(4, ge=1, le=16, description="Chunks of one hand-off that travel at once.")
    max_idle_channels: int = Field(64, ge=0, description="Unused gRPC channels to decode workers that stay open.")
    corrupt_every: int = Field(
        0,
        ge=0,
        description="Flip a bit in every n-th leg after its digest was computed; 0 is never.",
        json_schema_extra=FOR_TESTS,
    )

    @property
    def captured_tokens(self) -> int:
        """Of the largest step that is captured; 0: none is."""
        return min(self.capture_tokens, self.max_step_tokens)

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        if self.max_step_tokens < 2 * self.block_size:
            raise ValueError(f"max_step_tokens must be at least two blocks of {self.block_size} tokens")
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
