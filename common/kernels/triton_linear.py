"""Triton matrix products of few rows, bound by reading the weight once, with what surrounds them in a decoder fused in.

    out = epilogue(norm(x) @ weight.T)      norm: none, or RMSNorm   epilogue: none, += residual, or silu(gate) * up

A program owns some outputs and walks along their inputs. The scale of RMSNorm is a factor per row, so it is applied to
the product; its weight is applied to x on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_MIN_ROWS: Final = 16  # of an operand of a tensor core
MAX_ROWS: Final = 64
_NONE: Final = 0
_ADD: Final = 1
_SILU_MUL: Final = 2


@dataclass(frozen=True, slots=True)
class LinearTuning:
    """Choices that change speed alone."""

    outputs: int  # per program
    inputs: int  # per iteration
    num_warps: int
    num_stages: int
    use_tma: bool = False


def linear(x: torch.Tensor, weight: torch.Tensor, tuning: LinearTuning) -> torch.Tensor:
    """x: [T, in], rows contiguous, T at most `MAX_ROWS`; weight: [out, in], contiguous. Returns [T, out]."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, weight, None, 0.0, out, weight.shape[0], _NONE, tuning)
    return out


def norm_linear(
    x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, tuning: LinearTuning
) -> torch.Tensor:
    """`linear` of the RMSNorm of x. norm: [in]."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, weight, norm, eps, out, weight.shape[0], _NONE, tuning)
    return out


def norm_linear_silu_mul(
    x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, tuning: LinearTuning
) -> torch.Tensor:
    """silu(gate) * up of the RMSNorm of x. weight: [2n, in], gate first. Returns [T, n]."""
    num_outputs = weight.shape[0] // 2
    out = x.new_empty((x.shape[0], num_outputs))
    _launch(x, weight, norm, eps, out, num_outputs, _SILU_MUL, tuning)
    return out


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, tuning: LinearTuning) -> None:
    """Add the linear of x to `residual`, [T, out] contiguous, in place."""
    _launch(x, weight, None, 0.0, residual, weight.shape[0], _ADD, tuning)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    num_outputs: int,
    epilogue: int,
    tuning: LinearTuning,
) -> None:
    num_rows, num_inputs = x.shape
    assert num_rows <= MAX_ROWS and weight.is_contiguous() and out.is_contiguous()
    assert num_outputs % tuning.outputs == 0 and num_inputs % tuning.inputs == 0
    source = weight
    if tuning.use_tma:
        source = TensorDescriptor(weight, list(weight.shape), [num_inputs, 1], [tuning.outputs, tuning.inputs])
    _linear_kernel[(num_outputs // tuning.outputs,)](
        x, source, x if norm is None else norm, out, num_rows, num_outputs, x.stride(0), eps,
        INPUTS=num_inputs, NORM=norm is not None, EPILOGUE=epilogue, ROWS=max(_MIN_ROWS, triton.next_power_of_2(num_rows)),
        OUTPUTS=tuning.outputs, STEP=tuning.inputs, USE_TMA=tuning.use_tma,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip


@triton.jit
def _weight_tile(weight, output, at, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    USE_TMA: tl.constexpr):  # fmt: skip
    """[OUTPUTS, STEP]"""
    if USE_TMA:
        tile = weight.load([output, at])
    else:
        own = output + tl.arange(0, OUTPUTS).to(tl.int64)
        tile = tl.load(weight + own[:, None] * INPUTS + at + tl.arange(0, STEP)[None, :], eviction_policy="evict_first")
    return tile


@triton.jit
def _linear_kernel(
    x_ptr, weight, norm_ptr, out_ptr, num_rows, num_outputs, x_stride, eps,
    INPUTS: tl.constexpr, NORM: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Grid: (outputs / OUTPUTS,)."""
    first = tl.program_id(0) * OUTPUTS
    row = tl.arange(0, ROWS)
    mask = row < num_rows
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for at in tl.range(0, INPUTS, STEP):
        columns = at + tl.arange(0, STEP)
        x = tl.load(x_ptr + columns[:, None] + row[None, :] * x_stride, mask[None, :], other=0.0)  # [STEP, ROWS]
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            x = (wide * tl.load(norm_ptr + columns).to(tl.float32)[:, None]).to(x.dtype)
        acc = tl.dot(_weight_tile(weight, first, at, INPUTS, OUTPUTS, STEP, USE_TMA), x, acc)
        if EPILOGUE == 2:
            up = tl.dot(_weight_tile(weight, num_outputs + first, at, INPUTS, OUTPUTS, STEP, USE_TMA), x, up)
    if NORM:
        scale = tl.rsqrt(squares / INPUTS + eps)
        acc *= scale[None, :]
        up *= scale[None, :]
    if EPILOGUE == 2:
        # Rounded as the separate kernels round.
        gate = acc.to(out_ptr.dtype.element_ty).to(tl.float32)
        acc = gate / (1.0 + tl.exp(-gate)) * up.to(out_ptr.dtype.element_ty).to(tl.float32)
    own = out_ptr + row[None, :] * num_outputs + first + tl.arange(0, OUTPUTS)[:, None]
    if EPILOGUE == 1:
        acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32) + tl.load(own, mask[None, :], other=0.0).to(tl.float32)
    tl.store(own, acc.to(out_ptr.dtype.element_ty), mask[None, :])
