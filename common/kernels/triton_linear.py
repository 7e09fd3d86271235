"""Triton matrix products of few rows, bound by reading the weight once, with what follows them in a decoder fused in.

    out = epilogue(x @ weight.T + bias)      epilogue: none, += residual, or silu(gate) * up

A program owns some outputs and walks along their inputs. When it is done it asks the L2 cache for a part of the next
product's weight, so that memory does not idle while kernels change over. RMSNorm is not fused in: applied to x on the
way, even as late as possible, it keeps loads from running ahead and costs more than its own kernel.
"""

# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, attr-defined"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_MIN_ROWS: Final = 16  # of an operand of a tensor core
MAX_ROWS: Final = 64
_PREFETCH_BYTES: Final = 512  # of one row, by one instruction
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


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Ask for the first `row_bytes` of each row of a weight [out, in]; a multiple of 512."""

    weight: torch.Tensor
    row_bytes: int


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tuning: LinearTuning,
    prefetch: Prefetch | None = None,
) -> torch.Tensor:
    """x: [T, in], T at most `MAX_ROWS`; weight: [out, in]; bias: [out]. Returns [T, out]."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, weight, bias, out, weight.shape[0], _NONE, tuning, prefetch)
    return out


def linear_silu_mul(
    x: torch.Tensor, weight: torch.Tensor, tuning: LinearTuning, prefetch: Prefetch | None = None
) -> torch.Tensor:
    """silu(gate) * up. x: [T, in]; weight: [2n, in], gate first. Returns [T, n]."""
    num_outputs = weight.shape[0] // 2
    out = x.new_empty((x.shape[0], num_outputs))
    _launch(x, weight, None, out, num_outputs, _SILU_MUL, tuning, prefetch)
    return out


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    tuning: LinearTuning,
    prefetch: Prefetch | None = None,
) -> None:
    """Add the product to `residual`, [T, out] contiguous, in place. x: [T, in]; weight: [out, in]."""
    _launch(x, weight, None, residual, weight.shape[0], _ADD, tuning, prefetch)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    num_outputs: int,
    epilogue: int,
    tuning: LinearTuning,
    prefetch: Prefetch | None,
) -> None:
    num_rows, num_inputs = x.shape
    assert num_rows <= MAX_ROWS
    assert (num_outputs % tuning.outputs, num_inputs % tuning.inputs) == (0, 0)
    assert weight.is_contiguous()
    assert out.is_contiguous()
    source = weight
    if tuning.use_tma:
        source = TensorDescriptor(weight, list(weight.shape), [num_inputs, 1], [tuning.outputs, tuning.inputs])
    chunks_per_row = prefetch.row_bytes // _PREFETCH_BYTES if prefetch and x.device.type == "cuda" else 0
    upcoming = prefetch.weight if prefetch else weight
    num_programs = num_outputs // tuning.outputs
    num_chunks = upcoming.shape[0] * chunks_per_row
    threads = 32 * tuning.num_warps
    _linear_kernel[(num_programs,)](
        x, source, x if bias is None else bias, out, upcoming, num_rows, num_outputs, x.stride(0), num_chunks,
        upcoming.stride(0) * upcoming.element_size(),
        INPUTS=num_inputs, BIAS=bias is not None, EPILOGUE=epilogue,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(num_rows)), OUTPUTS=tuning.outputs, STEP=tuning.inputs,
        USE_TMA=tuning.use_tma, CHUNKS_PER_ROW=chunks_per_row, CHUNK_BYTES=_PREFETCH_BYTES, THREADS=threads,
        ROUNDS=triton.cdiv(num_chunks, num_programs * threads),
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
def _ask_for(
    upcoming_ptr, row_bytes, num_chunks, CHUNKS_PER_ROW: tl.constexpr, CHUNK_BYTES: tl.constexpr, THREADS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """One chunk a thread and round; those beyond the last repeat it."""
    for number in tl.static_range(ROUNDS):
        chunk = (number * tl.num_programs(0) + tl.program_id(0)) * THREADS + tl.arange(0, THREADS)
        chunk = tl.minimum(chunk, num_chunks - 1)
        place = (chunk // CHUNKS_PER_ROW).to(tl.int64) * row_bytes + (chunk % CHUNKS_PER_ROW) * CHUNK_BYTES
        address = upcoming_ptr.to(tl.int64) + place
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _linear_kernel(
    x_ptr, weight, bias_ptr, out_ptr, upcoming_ptr, num_rows, num_outputs, x_stride, num_chunks, upcoming_row_bytes,
    INPUTS: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr, USE_TMA: tl.constexpr, CHUNKS_PER_ROW: tl.constexpr,
    CHUNK_BYTES: tl.constexpr, THREADS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Grid: (outputs / OUTPUTS,)."""
    first = tl.program_id(0) * OUTPUTS
    row = tl.arange(0, ROWS)
    mask = row < num_rows
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for at in tl.range(0, INPUTS, STEP):
        columns = at + tl.arange(0, STEP)
        x = tl.load(x_ptr + columns[:, None] + row[None, :] * x_stride, mask[None, :], other=0.0)  # [STEP, ROWS]
        acc = tl.dot(_weight_tile(weight, first, at, INPUTS, OUTPUTS, STEP, USE_TMA), x, acc)
        if EPILOGUE == 2:
            up = tl.dot(_weight_tile(weight, num_outputs + first, at, INPUTS, OUTPUTS, STEP, USE_TMA), x, up)
    if CHUNKS_PER_ROW > 0:
        _ask_for(upcoming_ptr, upcoming_row_bytes, num_chunks, CHUNKS_PER_ROW, CHUNK_BYTES, THREADS, ROUNDS)
    output = first + tl.arange(0, OUTPUTS)
    if BIAS:
        acc += tl.load(bias_ptr + output).to(tl.float32)[:, None]
    if EPILOGUE == 2:
        # Rounded as the separate kernels round.
        gate = acc.to(out_ptr.dtype.element_ty).to(tl.float32)
        acc = gate / (1.0 + tl.exp(-gate)) * up.to(out_ptr.dtype.element_ty).to(tl.float32)
    own = out_ptr + row[None, :] * num_outputs + output[:, None]
    if EPILOGUE == 1:
        acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32) + tl.load(own, mask[None, :], other=0.0).to(tl.float32)
    tl.store(own, acc.to(out_ptr.dtype.element_ty), mask[None, :])
