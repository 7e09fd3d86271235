"""Triton kernels of attention, rows and blocks behind the signatures of `common.kernels.backend.KernelBackend`.

`cuda_backend` adds products and plans of any batch, and makes a whole backend of them. Shapes and effects are
documented at the reference. Beyond it there are decode plans that stay in place, so that a step can be captured into a
CUDA graph, and digests that stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from common.kernels import triton_prefill, triton_prefill_hopper, triton_rows
from common.kernels.batch import BatchPlan, KVShape
from common.kernels.triton_blocks import (
    digest_on_device,
    digest_value,
    gather_blocks,
    gather_slot,
    gather_with_digest,
    payload_digest,
    scatter_blocks,
    scatter_slot,
    scatter_with_digest,
)
from common.kernels.triton_decode import (
    DecodeBatch,
    DecodeTuning,
    decode_attention,
    default_tuning,
    refresh,
)
from common.kernels.triton_prefill import PrefillBatch
from common.kernels.triton_rows import add_rms_norm, finished, rms_norm, silu_mul

__all__ = [
    "TritonPlan",
    "add_rms_norm",
    "attention",
    "attention_into",
    "digest_on_device",
    "digest_value",
    "finished",
    "gather_blocks",
    "gather_slot",
    "gather_with_digest",
    "payload_digest",
    "plan_decode",
    "qk_norm_rope_store",
    "refresh_decode",
    "rms_norm",
    "scatter_blocks",
    "scatter_slot",
    "scatter_with_digest",
    "silu_mul",
    "spoil_cleaned",
    "tile_queries",
]


@dataclass(frozen=True, slots=True)
class TritonPlan(BatchPlan):
    """What is the same in every layer of a step. Made by `plan_decode`, or `cuda_backend`."""

    shape: KVShape
    store_slots: torch.Tensor  # [T] int64: block * block_size + offset; negative: not stored
    cleaned: torch.Tensor  # [T] int32: K or V of the token was not finite; zero between steps, see `spoil_cleaned`
    prefill: PrefillBatch | None
    decode: DecodeBatch | None
    decode_tuning: DecodeTuning


def plan_decode(
    num_sequences: int,
    max_blocks: int,
    windows: Iterable[int | None],
    shape: KVShape,
    dtype: torch.dtype,
    device: torch.device,
) -> TritonPlan:
    """A plan of padding rows, one token each, to capture a graph with.

    Before each replay fill `plan.decode.block_tables` and `.context_lengths` (0: padding); the captured part starts
    with `refresh_decode`.
    """
    decode = DecodeBatch(
        query_rows=torch.arange(num_sequences, dtype=torch.int32, device=device),
        block_tables=torch.zeros((num_sequences, max_blocks), dtype=torch.int32, device=device),
        context_lengths=torch.zeros(num_sequences, dtype=torch.int32, device=device),
        tile_ends=_tile_ends(windows, num_sequences, device),
        store_slots=torch.full((num_sequences,), -1, dtype=torch.int64, device=device),
    )
    plan = TritonPlan(
        shape=shape,
        store_slots=decode.store_slots,
        cleaned=torch.zeros(num_sequences, dtype=torch.int32, device=device),
        prefill=None,
        decode=decode,
        decode_tuning=default_tuning(shape.block_size, shape.head_dim, dtype),
    )
    refresh_decode(plan)
    return plan


def refresh_decode(plan: TritonPlan) -> None:
    """Recompute on the device what follows from the plan's block tables and context lengths. Waits for nothing."""
    assert plan.decode is not None
    refresh(plan.decode, plan.shape.block_size, plan.decode_tuning.tile)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    plan: BatchPlan,
) -> torch.Tensor:
    """As the reference; K and V in `qkv` are left as they were."""
    assert isinstance(plan, TritonPlan)
    return triton_rows.qk_norm_rope_store(
        qkv, num_heads, cos, sin, q_norm, k_norm, eps, kv_layer, plan.store_slots, plan.cleaned
    )


def spoil_cleaned(rows: torch.Tensor, plan: BatchPlan) -> None:
    """As the reference."""
    assert isinstance(plan, TritonPlan)
    triton_rows.spoil_cleaned(rows, plan.cleaned)


def attention(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: BatchPlan, window: int | None, scale: float
) -> torch.Tensor:
    """As the reference."""
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty((num_tokens, num_heads * head_dim))
    attention_into(q, kv_layer, plan, window, scale, out)
    return out


def attention_into(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: BatchPlan, window: int | None, scale: float, out: torch.Tensor
) -> None:
    """`attention` into `out`, [T, num_heads * head_dim]."""
    assert isinstance(plan, TritonPlan)
    if plan.prefill is not None:
        kernel = triton_prefill_hopper if triton_prefill_hopper.supports(q, kv_layer) else triton_prefill
        kernel.prefill_attention(q, kv_layer, plan.prefill, window, scale, out)
    if plan.decode is not None:
        decode_attention(q, kv_layer, plan.decode, window, scale, out, plan.decode_tuning)


def tile_queries(num_heads: int, kv_layer: torch.Tensor) -> int:
    """Queries in a tile of prefill attention over such a layer, `num_heads` heads of the layer's dtype."""
    q = kv_layer.new_empty((1, num_heads, kv_layer.shape[-1]))
    kernel = triton_prefill_hopper if triton_prefill_hopper.supports(q, kv_layer) else triton_prefill
    queries: int = kernel.tile_queries(num_heads, kv_layer)
    return queries


def _tile_ends(
    windows: Iterable[int | None], num_sequences: int, device: torch.device
) -> dict[int | None, torch.Tensor]:
    return {window: torch.zeros(num_sequences, dtype=torch.int32, device=device) for window in {None, *windows}}
