"""What a kernel backend provides, and which one serves a device. A backend is a module with these functions.

Shapes and effects are documented at the reference, which every backend must match: `common.kernels.reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final, Protocol, cast

import torch

from common.errors import InvalidArgument
from common.kernels import reference
from common.kernels.batch import BatchPlan, KVShape, Span
from common.kernels.scaled_rows import NormedRows


class KernelBackend(Protocol):
    """The operations of a decoder on one kind of device."""

    def layout_weight(self, weight: torch.Tensor, /) -> torch.Tensor: ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, /) -> torch.Tensor: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, /
    ) -> torch.Tensor: ...

    def linear_add_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        /,
    ) -> NormedRows: ...

    def gate_up_silu(self, x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None, /) -> torch.Tensor: ...

    def plan_batch(
        self,
        spans: Sequence[Span],
        windows: Iterable[int | None],
        shape: KVShape,
        dtype: torch.dtype,
        device: torch.device,
        /,
    ) -> BatchPlan: ...

    def qkv_rope_store(
        self,
        x: NormedRows,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        num_heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv_layer: torch.Tensor,
        plan: BatchPlan,
        /,
    ) -> torch.Tensor: ...

    def spoil_cleaned(self, rows: torch.Tensor, plan: BatchPlan, /) -> None: ...

    def attention(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: BatchPlan,
        window: int | None,
        scale: float,
        /,
    ) -> torch.Tensor: ...

    def gather_blocks(
        self,
        kv: torch.Tensor,
        block_ids: torch.Tensor,
        first_head: int,
        num_heads: int,
        payload: torch.Tensor,
        /,
    ) -> int: ...

    def scatter_blocks(
        self,
        kv: torch.Tensor,
        block_ids: torch.Tensor,
        first_head: int,
        num_heads: int,
        payload: torch.Tensor,
        /,
    ) -> None: ...

    def payload_digest(self, payload: torch.Tensor, /) -> int: ...


_CPU: Final[KernelBackend] = reference
_CUDA_MODULE: Final = "common.kernels.cuda_backend"


def kernels_for(device: torch.device) -> KernelBackend:
    """The backend of a device type; raises `InvalidArgument` for one that has none."""
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda":
        return _cuda()
    raise InvalidArgument("device", device, "must be one of cpu, cuda")


@cache
def _cuda() -> KernelBackend:
    """Imported when first asked for: processes without a GPU never load Triton."""
    return cast(KernelBackend, importlib.import_module(_CUDA_MODULE))
