"""LayerNorm and softmax in Triton, which no model that is served asks for: rows of `benchmarks.kernels`."""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.kernels.triton_rows import row_warps


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [T, n], rows contiguous; weight, bias: [n]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = triton.next_power_of_2(x.shape[1])
    _layer_norm_kernel[(x.shape[0],)](
        x, weight, bias, out, x.stride(0), x.shape[1], eps, COLUMNS=columns, num_warps=row_warps(columns)
    )
    return out


def softmax(x: torch.Tensor) -> torch.Tensor:
    """x: [T, n], rows contiguous. Softmax over the last dimension."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = triton.next_power_of_2(x.shape[1])
    _softmax_kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], COLUMNS=columns, num_warps=row_warps(columns))
    return out


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, stride, num_columns, eps, COLUMNS: tl.constexpr):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * stride + columns, mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x) / num_columns, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / num_columns + eps)
    weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask, other=0.0).to(tl.float32)
    out = centred * scale * weight + bias
    tl.store(out_ptr + row * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, stride, num_columns, COLUMNS: tl.constexpr):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * stride + columns, mask, other=float("-inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x))
    out = weights / tl.sum(weights)
    tl.store(out_ptr + row * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask)
