"""Triton kernels over the rows of activations: RMSNorm with and without residual add, SiLU·mul, QK-norm + rotary + KV
store. One pass over device memory each; sums in float32. They are launched dependently while rows are few
(`dependent_launch`).
"""
# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.kernels.dependent_launch import is_dependent, launch_options, start_next, wait_for_previous
from common.kernels.scaled_rows import NormedRows

_MAX_ROPE_HEADS = 64  # of one token per program
_ROPE_HEADS_PER_WARP = 16
_SILU_COLUMNS = 2048
_SPOIL_ROWS = 512


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., n], rows contiguous; weight: [n]. Normalised over the last dimension."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    num_rows, num_columns = rows.shape
    dependent = is_dependent(num_rows, x.device)
    _rms_norm_kernel[(num_rows,)](
        rows, rows, weight, out, rows.stride(0), 0, num_columns, eps,
        WITH_RESIDUAL=False, COLUMNS=triton.next_power_of_2(num_columns), DEPENDENT=dependent,
        num_warps=row_warps(num_columns), **launch_options(dependent),
    )  # fmt: skip
    return out.view(x.shape)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x to `residual` in place and return the norm of the sum. x, residual: [T, n]; weight: [n]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_rows, num_columns = x.shape
    dependent = is_dependent(num_rows, x.device)
    _rms_norm_kernel[(num_rows,)](
        x, residual, weight, out, x.stride(0), residual.stride(0), num_columns, eps,
        WITH_RESIDUAL=True, COLUMNS=triton.next_power_of_2(num_columns), DEPENDENT=dependent,
        num_warps=row_warps(num_columns), **launch_options(dependent),
    )  # fmt: skip
    return out


def finished(rows: NormedRows) -> torch.Tensor:
    """[T, n], normalised: for products that do not finish `ScaledRows` themselves."""
    if isinstance(rows, torch.Tensor):
        return rows
    num_rows, num_columns = rows.values.shape
    num_parts, stride = rows.squares.shape
    out = torch.empty_like(rows.values)
    dependent = is_dependent(num_rows, out.device)
    _finish_kernel[(num_rows,)](
        rows.values, rows.squares, out, num_columns, stride, rows.eps,
        PARTS=num_parts, COLUMNS=triton.next_power_of_2(num_columns), DEPENDENT=dependent,
        num_warps=row_warps(num_columns), **launch_options(dependent),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [T, 2n], gate first. Returns silu(gate) * up, [T, n]."""
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, num_columns))
    columns = min(_SILU_COLUMNS, triton.next_power_of_2(num_columns))
    grid = (num_rows, triton.cdiv(num_columns, columns))
    dependent = is_dependent(num_rows, gate_up.device)
    _silu_mul_kernel[grid](
        gate_up, out, gate_up.stride(0), num_columns, COLUMNS=columns, DEPENDENT=dependent, num_warps=4,
        **launch_options(dependent),
    )  # fmt: skip
    return out


def qk_norm_rope_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    store_slots: torch.Tensor,
    cleaned: torch.Tensor,
) -> torch.Tensor:
    """Normalise (if the model does) and rotate Q and K, store K and V in their blocks, return Q.

    qkv: [T, num_heads + 2 * num_kv_heads, head_dim] contiguous, its Q overwritten; cos, sin: [T, 1, head_dim];
    q_norm, k_norm: [head_dim]; kv_layer: [num_blocks, 2, num_kv_heads, block_size, head_dim];
    store_slots: [T] int64, block * block_size + offset, negative: not stored; cleaned: [T] int32, set to 1 for tokens
    of which something was not finite and zero was stored. Returns [T, num_heads, head_dim], a view of qkv.
    """
    num_tokens, num_all_heads, head_dim = qkv.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    heads = min(_MAX_ROPE_HEADS, triton.next_power_of_2(num_all_heads))
    grid = (num_tokens, triton.cdiv(num_all_heads, heads))
    dependent = is_dependent(num_tokens, qkv.device)
    _qk_norm_rope_store_kernel[grid](
        qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, kv_layer, store_slots,
        cleaned, eps, cos.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, HEADS=heads,
        WITH_NORM=q_norm is not None and k_norm is not None, DEPENDENT=dependent,
        num_warps=max(1, heads // _ROPE_HEADS_PER_WARP), **launch_options(dependent),
    )  # fmt: skip
    return qkv[:, :num_heads]


def spoil_cleaned(rows: torch.Tensor, cleaned: torch.Tensor) -> None:
    """Make the first number of the rows of cleaned tokens NaN, and forget that they were.

    rows: [T, n], rows contiguous; cleaned: [T] int32, as stores leave it, zero afterwards.
    """
    num_rows = rows.shape[0]
    _spoil_kernel[(triton.cdiv(num_rows, _SPOIL_ROWS),)](
        rows, cleaned, rows.stride(0), num_rows, ROWS=_SPOIL_ROWS, num_warps=4
    )


def row_warps(num_columns: int) -> int:
    """Warps for a row: sixteen elements a thread, within a thread block's limits."""
    return min(16, max(4, 1 << (num_columns - 1).bit_length() >> 9))


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, residual_stride, num_columns, eps,
    WITH_RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,)."""
    if DEPENDENT:
        start_next()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < num_columns
    if DEPENDENT:
        weight = tl.load(weight_ptr + columns, mask, other=0.0)
        wait_for_previous()
    x = tl.load(x_ptr + row * x_stride + columns, mask, other=0.0)
    if WITH_RESIDUAL:
        own = residual_ptr + row * residual_stride + columns
        # The sum is rounded to the residual's type first: the norm must be that of what the next layer reads.
        x = (x.to(tl.float32) + tl.load(own, mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(own, x, mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / num_columns + eps)
    if not DEPENDENT:
        weight = tl.load(weight_ptr + columns, mask, other=0.0)
    out = x * scale * weight.to(tl.float32)
    tl.store(out_ptr + row * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _finish_kernel(
    values_ptr, squares_ptr, out_ptr, num_columns, squares_stride, eps,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,)."""
    if DEPENDENT:
        start_next()
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    columns = tl.arange(0, COLUMNS)
    squares = tl.load(squares_ptr + part * squares_stride + row, part < PARTS, other=0.0)
    values = tl.load(values_ptr + row * num_columns + columns, columns < num_columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares) / num_columns + eps)
    tl.store(
        out_ptr + row * num_columns + columns, (values * scale).to(out_ptr.dtype.element_ty), columns < num_columns
    )


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, stride, num_columns, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """Grid: (rows, pieces of COLUMNS)."""
    if DEPENDENT:
        start_next()
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < num_columns
    gate = tl.load(gate_up_ptr + row * stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + num_columns + columns, mask, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * num_columns + columns, product.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _head_scale(scale, q_norm_ptr, k_norm_ptr, is_query, is_value):
    """[heads, columns]: what normalises Q and K heads, 1 for V."""
    weight = tl.where(is_query, tl.load(q_norm_ptr), tl.load(k_norm_ptr)).to(tl.float32)
    return tl.where(is_value, 1.0, scale * weight)


@triton.jit
def _angles(cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Cosines and sines of the lower half of a head, then of the upper one."""
    cos_low, sin_low = tl.load(cos_ptr), tl.load(sin_ptr)
    cos_high, sin_high = tl.load(cos_ptr + HALF), tl.load(sin_ptr + HALF)
    return cos_low.to(tl.float32), sin_low.to(tl.float32), cos_high.to(tl.float32), sin_high.to(tl.float32)


@triton.jit
def store_finite(low_ptr, high_ptr, low, high, keep):
    """Store both halves of heads where `keep` is set, zero for what is not finite. Returns where that was.

    Blocks only ever hold finite numbers: attention multiplies what it masks by zero, so a NaN would reach others.
    """
    is_low = tl.abs(low.to(tl.float32)) < float("inf")
    is_high = tl.abs(high.to(tl.float32)) < float("inf")
    tl.store(low_ptr, tl.where(is_low, low, 0.0), keep)
    tl.store(high_ptr, tl.where(is_high, high, 0.0), keep)
    return keep & ((is_low & is_high) == 0)


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, kv_ptr, slots_ptr, cleaned_ptr, eps, angle_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, WITH_NORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, groups of HEADS). A thread owns both halves of what it rotates, so working in place is safe."""
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    if DEPENDENT:
        start_next()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, HALF)[None, :]
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    own = qkv_ptr + (token * ALL_HEADS + head) * HEAD_DIM + dim
    angle = token * angle_stride + dim
    if DEPENDENT:
        # Written at the start of the step, before the product that has waited since.
        cos_low, sin_low, cos_high, sin_high = _angles(cos_ptr + angle, sin_ptr + angle, HALF)
        slot = tl.load(slots_ptr + token)
        wait_for_previous()
    low = tl.load(own, head < ALL_HEADS, other=0.0).to(tl.float32)
    high = tl.load(own + HALF, head < ALL_HEADS, other=0.0).to(tl.float32)
    if WITH_NORM:
        scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1, keep_dims=True) / HEAD_DIM + eps)
        low *= _head_scale(scale, q_norm_ptr + dim, k_norm_ptr + dim, is_query, is_value)
        high *= _head_scale(scale, q_norm_ptr + HALF + dim, k_norm_ptr + HALF + dim, is_query, is_value)
    if not DEPENDENT:
        cos_low, sin_low, cos_high, sin_high = _angles(cos_ptr + angle, sin_ptr + angle, HALF)
        slot = tl.load(slots_ptr + token)
    # Values are turned by nothing: exactly themselves.
    cos_low, sin_low = tl.where(is_value, 1.0, cos_low), tl.where(is_value, 0.0, sin_low)
    cos_high, sin_high = tl.where(is_value, 1.0, cos_high), tl.where(is_value, 0.0, sin_high)
    rotated_low = low * cos_low + high * sin_low
    rotated_high = high * cos_high + low * sin_high
    low = rotated_low.to(qkv_ptr.dtype.element_ty)
    high = rotated_high.to(qkv_ptr.dtype.element_ty)
    tl.store(own, low, is_query)
    tl.store(own + HALF, high, is_query)
    # K heads, then V heads: in a block that is the order of its 2 * NUM_KV_HEADS tiles.
    tile = (slot // BLOCK_SIZE) * (2 * NUM_KV_HEADS) + (head - NUM_HEADS)
    stored = kv_ptr + (tile * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dim
    keep = (head >= NUM_HEADS) & (head < ALL_HEADS) & (slot >= 0)
    kv_low, kv_high = low.to(kv_ptr.dtype.element_ty), high.to(kv_ptr.dtype.element_ty)
    is_cleaned = store_finite(stored, stored + HALF, kv_low, kv_high, keep)
    tl.store(cleaned_ptr + token, 1, tl.max(is_cleaned.to(tl.int32)) != 0)


@triton.jit(do_not_specialize=["num_rows"])
def _spoil_kernel(rows_ptr, cleaned_ptr, stride, num_rows, ROWS: tl.constexpr):
    """Grid: (groups of ROWS,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    was_cleaned = tl.load(cleaned_ptr + row, row < num_rows, other=0) != 0
    tl.store(rows_ptr + row * stride, float("nan"), was_cleaned)
    tl.store(cleaned_ptr + row, 0, was_cleaned)
