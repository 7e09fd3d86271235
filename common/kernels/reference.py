"""The kernels of a decoder in plain torch: the CPU's backend, and what other backends are compared with.

Every function has the signature that `common.kernels.backend.KernelBackend` fixes. Knows no model.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from common.kernels.attention_reference import ReferencePlan, attention, plan_batch
from common.kernels.batch import BatchPlan
from common.kernels.blocks_reference import gather_blocks, payload_digest, scatter_blocks
from common.kernels.scaled_rows import NormedRows, finished

__all__ = [
    "add_rms_norm",
    "attention",
    "gate_up_silu",
    "gather_blocks",
    "layout_weight",
    "linear",
    "linear_add_norm",
    "payload_digest",
    "plan_batch",
    "qk_norm_rope_store",
    "qkv_rope_store",
    "rms_norm",
    "scatter_blocks",
    "silu_mul",
    "spoil_cleaned",
]


def layout_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] → [in, out] in memory: for a few rows of input that is up to twice as fast on the CPU."""
    return weight.t().contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: [T, in]; weight: [in, out] as `layout_weight` made it; bias: [out]. Returns [T, out]."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., n]; weight: [n]. Normalised over the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x to `residual` in place and return the norm of the sum. x, residual: [T, n]; weight: [n]."""
    return rms_norm(residual.add_(x), weight, eps)


def linear_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> NormedRows:
    """Add `linear` to `residual`, [T, out], in place and return the RMSNorm of the sum; norm: [out], its weight."""
    return add_rms_norm(linear(x, weight, bias), residual, norm, eps)


def gate_up_silu(x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """weight: [in, 2n], gate first, as `layout_weight` made it; bias: [2n]. Returns silu(gate) * up, [T, n]."""
    return silu_mul(linear(finished(x), weight, bias))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [T, 2n], gate first. Returns silu(gate) * up, [T, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def qkv_rope_store(
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
) -> torch.Tensor:
    """`linear`, then `qk_norm_rope_store`. weight: [in, (num_heads + 2 * num_kv_heads) * head_dim]."""
    qkv = linear(finished(x), weight, bias).view(-1, weight.shape[1] // kv_layer.shape[-1], kv_layer.shape[-1])
    return qk_norm_rope_store(qkv, num_heads, cos, sin, q_norm, k_norm, eps, kv_layer, plan)


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
    """Normalise (if the model does) and rotate Q and K, store K and V in their blocks, return Q.

    Blocks only ever hold finite numbers: what is not finite is stored as zero, and its token noted in the plan for
    `spoil_cleaned`.

    qkv: [T, num_heads + 2 * num_kv_heads, head_dim], overwritten; cos, sin: [T, 1, head_dim];
    q_norm, k_norm: [head_dim]; kv_layer: [num_blocks, 2, num_kv_heads, block_size, head_dim].
    Returns [T, num_heads, head_dim], a view of qkv.
    """
    assert isinstance(plan, ReferencePlan)
    _, _, num_kv_heads, _, head_dim = kv_layer.shape
    if q_norm is not None and k_norm is not None:
        q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
        q.copy_(rms_norm(q, q_norm, eps))
        k.copy_(rms_norm(k, k_norm, eps))
    qk = qkv[:, : num_heads + num_kv_heads]
    swapped = qk.roll(head_dim // 2, dims=-1)
    qk.mul_(cos).addcmul_(swapped, sin)
    stored = qkv[:, num_heads:]
    # A sum that overflows although all is finite only costs a second look.
    if not stored.sum(dtype=torch.promote_types(stored.dtype, torch.float32)).isfinite():
        plan.cleaned.logical_or_(stored.isfinite().flatten(1).all(1).logical_not_())
        # Attention multiplies what it masks by zero, so a NaN that stayed behind in a block would reach its next owner.
        stored = stored.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    kv_layer.view(-1, head_dim).index_copy_(0, plan.store_index, stored.reshape(-1, head_dim))
    return qkv[:, :num_heads]


def spoil_cleaned(rows: torch.Tensor, plan: BatchPlan) -> None:
    """Make the first number of a row NaN if K or V of its token was stored as zero since the last call.

    What is computed of such a block looks right and is not. A sum over ranks of rows that one rank has spoiled tells
    all of them. rows: [T, n], tokens in the plan's order.
    """
    assert isinstance(plan, ReferencePlan)
    if plan.cleaned.any():
        rows[:, 0].masked_fill_(plan.cleaned, float("nan"))
        plan.cleaned.zero_()
