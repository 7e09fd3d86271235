"""The decode worker's settings. Defaults are those of a single machine; every field explains itself in `--help`."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from common.config import Address, AddressOrNone
from common.worker.kv_address import check_reachable
from common.worker.worker_config import WorkerConfig
from services.decode.handoff_context import HandoffLimits


class DecodeConfig(WorkerConfig):
    """The decode worker: receives KV caches from prefill workers and produces tokens."""

    service: ClassVar[str] = "decode"

    worker_id: str = Field("decode-0", pattern=r"^[\x21-\x7e]{1,64}$", description="Name, unique in the deployment.")
    listen: Address = Field("127.0.0.1:50071", description="host:port for routers and prefill workers.")
    advertise: AddressOrNone = Field(
        "", description="host:port in tickets, at which prefill workers reach this one; listen if empty."
    )

    chunk_tokens: int = Field(
        256, ge=1, description="Prompt tokens of one step, beside its decoding rows, where prompts are computed here."
    )
    capture_chunks: bool = Field(
        False,
        description="On GPUs: capture steps with prompt tokens as well, where computing prompts here is the rule.",
    )
    max_open: int = Field(512, ge=1, description="Sequences in all states; more are refused.")
    grant_timeout_s: float = Field(5.0, gt=0, description="Time for the bytes of one chunk, seconds.")
    cancel_timeout_s: float = Field(0.5, gt=0, description="After this a receive under way is in doubt, seconds.")
    max_waiting_chunks: int = Field(4096, ge=1, description="Chunks that may wait for a staging slot.")

    @model_validator(mode="after")
    def _check_reachable(self) -> Self:
        check_reachable(self.listen, self.advertise)
        return self

    @property
    def handoff_limits(self) -> HandoffLimits:
        """The hand-off's part."""
        return HandoffLimits(
            grant_timeout_s=self.grant_timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            cancel_timeout_s=self.cancel_timeout_s,
            max_waiting_chunks=self.max_waiting_chunks,
            max_chunk_resends=self.max_chunk_resends,
        )
