"""Triton matrix products for a decode step: few rows against a weight that is read once, so speed is that of memory.

Weights lie [out, in] in memory: a tile is then rows of consecutive bytes. Optional endings save a kernel: SiLU(gate) *
up, where each program computes matching columns of both, and adding to the residual in place. The inputs of a product
may be cut into parts; the last program to arrive sums the parts of a tile in their order, so results never vary.

Launched dependently (`dependent_launch`), a product starts while the kernel before it still runs, and fetches its first
weights into the second-level cache before it waits for that kernel: weights depend on nothing.
"""
# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from common.errors import InternalError
from common.kernels.dependent_launch import by_policy, launch_options, start_next, wait_for_previous
from common.kernels.linear_tuning import TUNED, Launch, LinearTuning, default_tuning, padded_rows
from common.kernels.triton_device import current_stream, is_hopper

MAX_ROWS: Final = 128
PIECE_BYTES: Final = 256  # of a weight row, fetched by one instruction
_MIN_ARRIVALS: Final = 4096
_KEPT_ROW_ELEMENTS: Final = 1 << 18  # of parts, at least: 1 MiB


@dataclass(frozen=True, slots=True)
class _Workspace:
    """What programs leave for each other; one per device and stream, as launches on a stream follow each other."""

    parts: torch.Tensor  # float32
    arrivals: torch.Tensor  # int32, zero between launches


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """x: [T, in]; weight: [in, out]. Whether these functions take them: few rows, a weight that lies [out, in]."""
    num_in = weight.shape[0]
    return (
        0 < x.shape[0] <= MAX_ROWS
        and x.stride(1) == 1
        and weight.stride() == (1, num_in)
        and num_in * weight.element_size() % 16 == 0
        and x.dtype == weight.dtype
    )


def is_ahead(x: torch.Tensor, weight: torch.Tensor, is_gated: bool) -> bool:
    """Whether the product is one of those that together beat cuBLAS (`TUNED`). x: [T, in]; weight: [in, out]."""
    num_in, num_out = weight.shape
    key = num_in, num_out // 2 if is_gated else num_out, is_gated, padded_rows(x.shape[0])
    return key in TUNED and x.dtype == torch.bfloat16 and is_hopper(x.device) and supports(x, weight)


def linear_few(x: torch.Tensor, weight: torch.Tensor, tuning: LinearTuning | None = None) -> torch.Tensor:
    """x: [T, in], T <= 128; weight: [in, out] of strides (1, in). Returns [T, out]."""
    out = x.new_empty((x.shape[0], weight.shape[1]))
    _launch(x, weight, out, False, False, tuning)
    return out


def linear_add_few(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, tuning: LinearTuning | None = None
) -> torch.Tensor:
    """Add x @ weight to `residual`, [T, out], in place and return it. Otherwise as `linear_few`."""
    _launch(x, weight, residual, False, True, tuning)
    return residual


def gate_up_silu_few(x: torch.Tensor, weight: torch.Tensor, tuning: LinearTuning | None = None) -> torch.Tensor:
    """weight: [in, 2n], gate first. Returns silu(gate) * up, [T, n]. Otherwise as `linear_few`."""
    out = x.new_empty((x.shape[0], weight.shape[1] // 2))
    _launch(x, weight, out, True, False, tuning)
    return out


def _launch(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool, add: bool, tuning: LinearTuning | None
) -> None:
    """out: [T, outputs]"""
    if not supports(x, weight):
        raise InternalError(f"no product for x {tuple(x.shape)} and a weight of strides {weight.stride()}, {x.dtype}")
    (num_rows, num_in), num_columns = x.shape, out.shape[1]
    if tuning is None:
        tuning = by_policy(default_tuning(num_in, num_columns, gated, num_rows))
    rows = padded_rows(num_rows)
    tiles = triton.cdiv(num_columns, tuning.block_n)
    # Every part has inputs: otherwise it would not be a part.
    part_in = triton.cdiv(triton.cdiv(num_in, tuning.split), tuning.block_k) * tuning.block_k
    split = triton.cdiv(num_in, part_in)
    space = _workspace(x.device, tiles, tiles * split * rows * tuning.block_n * (2 if gated else 1))
    rows_in_memory = weight.t()
    box = [tuning.block_n, tuning.block_k]
    dependent = tuning.launch != Launch.PLAIN
    _linear_kernel[(tiles * split,)](
        x, rows_in_memory,
        TensorDescriptor(rows_in_memory, [weight.shape[1], num_in], [num_in, 1], box) if tuning.use_tma else None,
        out, space.parts, space.arrivals, num_rows, x.stride(0), out.stride(0),
        NUM_COLUMNS=num_columns, NUM_IN=num_in, PART_IN=part_in, ROWS=rows, BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k, SPLIT=split, GATED=gated, ADD=add, SWAP=tuning.swap, USE_TMA=tuning.use_tma,
        DEPENDENT=dependent, PIECES=tuning.prefetch_bytes // PIECE_BYTES, PIECE_BYTES=PIECE_BYTES,
        STAGES=tuning.num_stages, num_warps=tuning.num_warps, num_stages=tuning.num_stages,
        **launch_options(dependent),
    )  # fmt: skip


_WORKSPACES: dict[tuple[torch.device, int], _Workspace] = {}
_KEPT: list[_Workspace] = []  # captured graphs hold addresses, not references


def _workspace(device: torch.device, num_tiles: int, num_elements: int) -> _Workspace:
    """Grown when needed, kept otherwise: a captured graph keeps using the tensors it was captured with."""
    key = device, current_stream(device)
    space = _WORKSPACES.get(key)
    if space is None or space.parts.numel() < num_elements or space.arrivals.numel() < num_tiles:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InternalError("a product must run once before it is captured, to have a cleared workspace")
        space = _Workspace(
            parts=torch.empty(max(num_elements, _KEPT_ROW_ELEMENTS), dtype=torch.float32, device=device),
            arrivals=torch.zeros(max(num_tiles, _MIN_ARRIVALS), dtype=torch.int32, device=device),
        )
        _WORKSPACES[key] = space
        _KEPT.append(space)
    return space


@triton.jit
def _prefetch(weight_ptr, first, last, k, NUM_IN: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
              PIECE_BYTES: tl.constexpr):  # fmt: skip
    """Ask for the first PIECES pieces from input k on of rows [first, first + BLOCK_N), without waiting for them."""
    ELEMENTS: tl.constexpr = PIECE_BYTES // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.minimum(first + tl.arange(0, BLOCK_N), last).to(tl.int64)
    # Past the end of a row: once more its last piece.
    column = tl.minimum(k + tl.arange(0, PIECES) * ELEMENTS, NUM_IN - ELEMENTS)
    at = weight_ptr + row[:, None] * NUM_IN + column[None, :]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r", [at.to(tl.int64), PIECE_BYTES], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _weight_tile(
    weight_ptr, weight, row, last, k,
    NUM_IN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K]; rows past the last are some row or 0, inputs past the end are 0."""
    if USE_TMA:
        tile = weight.load([row, k])
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_N), last).to(tl.int64)
        column = k + tl.arange(0, BLOCK_K)
        at = weight_ptr + rows[:, None] * NUM_IN + column[None, :]
        tile = tl.load(at) if NUM_IN % BLOCK_K == 0 else tl.load(at, column[None, :] < NUM_IN, other=0.0)
    return tile


@triton.jit
def _multiply(x, tile, acc, SWAP: tl.constexpr):
    """acc + x @ tile.T, [ROWS, BLOCK_N], or transposed."""
    if SWAP:
        acc = tl.dot(tile, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(tile), acc, input_precision="ieee")
    return acc


@triton.jit
def _finish(
    acc, acc_up, out_ptr, out_stride, row, column, num_rows,
    NUM_COLUMNS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    at = out_ptr + row * out_stride + column
    mask = (row < num_rows) & (column < NUM_COLUMNS)
    if ADD:
        acc += tl.load(at, mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr, weight_ptr, weight, out_ptr, parts_ptr, arrivals_ptr, num_rows, x_stride, out_stride,
    NUM_COLUMNS: tl.constexpr, NUM_IN: tl.constexpr, PART_IN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, SWAP: tl.constexpr,
    USE_TMA: tl.constexpr, DEPENDENT: tl.constexpr, PIECES: tl.constexpr, PIECE_BYTES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of BLOCK_N outputs * SPLIT,). With GATED up's rows of the weight follow gate's NUM_COLUMNS."""
    LAST: tl.constexpr = NUM_COLUMNS * (2 if GATED else 1) - 1
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    first = tile * BLOCK_N
    begin = part * PART_IN
    end = tl.minimum(begin + PART_IN, NUM_IN)
    if DEPENDENT:
        if PIECES > 0:
            _prefetch(weight_ptr, first, LAST, begin, NUM_IN, BLOCK_N, PIECES, PIECE_BYTES)
            if GATED:
                _prefetch(weight_ptr, NUM_COLUMNS + first, LAST, begin, NUM_IN, BLOCK_N, PIECES, PIECE_BYTES)
        wait_for_previous()
    acc = tl.zeros([BLOCK_N, ROWS] if SWAP else [ROWS, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_N, ROWS] if SWAP else [ROWS, BLOCK_N], tl.float32)
    row = tl.arange(0, ROWS)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inputs = k + tl.arange(0, BLOCK_K)[None, :]
        is_input = row[:, None] < num_rows
        if NUM_IN % BLOCK_K != 0:
            is_input &= inputs < NUM_IN
        x = tl.load(x_ptr + row[:, None] * x_stride + inputs, is_input, other=0.0)
        own = _weight_tile(weight_ptr, weight, first, LAST, k, NUM_IN, BLOCK_N, BLOCK_K, USE_TMA)
        acc = _multiply(x, own, acc, SWAP)
        if GATED:
            up = _weight_tile(weight_ptr, weight, NUM_COLUMNS + first, LAST, k, NUM_IN, BLOCK_N, BLOCK_K, USE_TMA)
            acc_up = _multiply(x, up, acc_up, SWAP)
    if DEPENDENT:
        start_next()
    column = tl.arange(0, BLOCK_N)
    if SWAP:
        row, column = row[None, :], column[:, None]
        at = column * ROWS + row
    else:
        row, column = row[:, None], column[None, :]
        at = row * BLOCK_N + column
    if SPLIT == 1:
        _finish(acc, acc_up, out_ptr, out_stride, row, first + column, num_rows, NUM_COLUMNS, GATED, ADD)
    else:
        SIZE: tl.constexpr = ROWS * BLOCK_N
        PART_SIZE: tl.constexpr = SIZE * (2 if GATED else 1)
        parts = parts_ptr + tile * (SPLIT * PART_SIZE) + at
        tl.store(parts + part * PART_SIZE, acc)
        if GATED:
            tl.store(parts + part * PART_SIZE + SIZE, acc_up)
        tl.debug_barrier()  # all of the program's stores, before one thread announces them
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            # Written by other programs: read past the first-level cache.
            total = tl.load(parts, cache_modifier=".cg")
            total_up = tl.load(parts + SIZE, cache_modifier=".cg") if GATED else total
            for other in tl.static_range(1, SPLIT):
                total += tl.load(parts + other * PART_SIZE, cache_modifier=".cg")
                if GATED:
                    total_up += tl.load(parts + other * PART_SIZE + SIZE, cache_modifier=".cg")
            _finish(total, total_up, out_ptr, out_stride, row, first + column, num_rows, NUM_COLUMNS, GATED, ADD)
            tl.store(arrivals_ptr + tile, 0)
