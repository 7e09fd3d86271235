"""The Triton kernel of products with few rows, and what it may end with; `triton_linear` launches it."""
# ruff: noqa: N803, N806, SIM109 - constants of a kernel are upper case, and it knows no tuples of them
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

from common.kernels.dependent_launch import start_next, wait_for_previous
from common.kernels.triton_rows import store_finite


class Ending(IntEnum):
    """What a product does with its sums."""

    STORE = 0
    SILU = 1  # silu(gate) * up: a program computes matching columns of both
    ADD = 2  # to the residual, in place, and what the next norm begins with: `ScaledRows`
    ROTATE = 3  # Q and K by their positions, Q stored, K and V in their blocks: both halves of a head in a program


_SILU = tl.constexpr(Ending.SILU.value)
_ADD = tl.constexpr(Ending.ADD.value)
_ROTATE = tl.constexpr(Ending.ROTATE.value)
_MAX_EARLY = tl.constexpr(4096)  # sums of a program, of each of its tiles


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
def _squares(squares_ptr, SQUARES: tl.constexpr, ROWS: tl.constexpr):
    """[parts, ROWS]; 0 for parts that are none."""
    part = tl.arange(0, triton.next_power_of_2(SQUARES))[:, None]
    return tl.load(squares_ptr + part * ROWS + tl.arange(0, ROWS)[None, :], part < SQUARES, other=0.0)


@triton.jit
def _normalise(acc, squares, eps, NUM_IN: tl.constexpr, SWAP: tl.constexpr):
    """Sums over ScaledRows become sums over normalised rows. squares: [parts, ROWS]"""
    scale = tl.rsqrt(tl.sum(squares, 0) / NUM_IN + eps)
    return acc * (scale[None, :] if SWAP else scale[:, None])


@triton.jit
def _needed(
    out_ptr, out_stride, norm_ptr, cos_ptr, sin_ptr, angle_stride, slots_ptr, squares_ptr, row, column, num_rows,
    NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, ENDING: tl.constexpr, SQUARES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """What the ending reads besides the sums, asked for before they are there: row, column as for `_end`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    squares, slot, residual, norm = 0.0, 0, 0.0, 0.0
    cos_low, sin_low, cos_high, sin_high = 0.0, 0.0, 0.0, 0.0
    if SQUARES > 0:
        squares = _squares(squares_ptr, SQUARES, ROWS)
    if ENDING == _ADD:
        residual = tl.load(out_ptr + row * out_stride + column, (row < num_rows) & (column < NUM_COLUMNS), other=0.0)
        norm = tl.load(norm_ptr + column, column < NUM_COLUMNS, other=0.0)
    if ENDING == _ROTATE:
        mask = (row < num_rows) & (column < HALF)
        at = row * angle_stride + column
        cos_low, cos_high = tl.load(cos_ptr + at, mask, other=0.0), tl.load(cos_ptr + at + HALF, mask, other=0.0)
        sin_low, sin_high = tl.load(sin_ptr + at, mask, other=0.0), tl.load(sin_ptr + at + HALF, mask, other=0.0)
        slot = tl.load(slots_ptr + row, row < num_rows, other=-1)
    return squares, residual, norm, cos_low, sin_low, cos_high, sin_high, slot


@triton.jit
def _add(
    acc, residual, norm, out_ptr, out_stride, scaled_ptr, squares_ptr, tile, row, column, num_rows,
    NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    mask = (row < num_rows) & (column < NUM_COLUMNS)
    # Rounded to the residual's type first: the norm must be that of what the next layer reads.
    rounded = tl.where(mask, acc + residual.to(tl.float32), 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, rounded, mask)
    wide = rounded.to(tl.float32)
    scaled = (wide * norm.to(tl.float32)).to(scaled_ptr.dtype.element_ty)
    tl.store(scaled_ptr + row * NUM_COLUMNS + column, scaled, mask)
    tl.store(squares_ptr + tile * ROWS + tl.arange(0, ROWS), tl.sum(wide * wide, 0 if SWAP else 1))


@triton.jit
def _rotate(
    low, high, cos_low, sin_low, cos_high, sin_high, slot, q_ptr, q_stride, kv_ptr, cleaned_ptr, head, row, dim,
    num_rows,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """low, high: columns `dim` of a head's lower half, and those of its upper half."""
    HALF: tl.constexpr = HEAD_DIM // 2
    mask = (row < num_rows) & (dim < HALF)
    if head < NUM_HEADS + NUM_KV_HEADS:  # values are turned by nothing
        turned = low * cos_low.to(tl.float32) + high * sin_low.to(tl.float32)
        high = high * cos_high.to(tl.float32) + low * sin_high.to(tl.float32)
        low = turned
    if head < NUM_HEADS:
        own = q_ptr + row * q_stride + head * HEAD_DIM + dim
        tl.store(own, low.to(q_ptr.dtype.element_ty), mask)
        tl.store(own + HALF, high.to(q_ptr.dtype.element_ty), mask)
    else:
        # K heads, then V heads: in a block that is the order of its 2 * NUM_KV_HEADS tiles.
        tile = (slot // BLOCK_SIZE) * (2 * NUM_KV_HEADS) + (head - NUM_HEADS)
        stored = kv_ptr + (tile * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dim
        kv_low, kv_high = low.to(kv_ptr.dtype.element_ty), high.to(kv_ptr.dtype.element_ty)
        is_cleaned = store_finite(stored, stored + HALF, kv_low, kv_high, mask & (slot >= 0))
        # A store of every element, whose mask is nearly never set: less than what a maximum over the tile takes.
        tl.store(cleaned_ptr + row + dim * 0, 1, is_cleaned)


@triton.jit
def _end(
    acc, acc_second, needed, eps, out_ptr, out_stride, scaled_ptr, squares_out_ptr, kv_ptr, cleaned_ptr, tile, head,
    row, column, num_rows,
    NUM_COLUMNS: tl.constexpr, NUM_IN: tl.constexpr, ROWS: tl.constexpr, ENDING: tl.constexpr, SWAP: tl.constexpr,
    SQUARES: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """row, column: those of the sums, or with ROTATE the column within half a head."""
    squares, residual, norm, cos_low, sin_low, cos_high, sin_high, slot = needed
    if SQUARES > 0:
        acc = _normalise(acc, squares, eps, NUM_IN, SWAP)
        if ENDING == _SILU or ENDING == _ROTATE:
            acc_second = _normalise(acc_second, squares, eps, NUM_IN, SWAP)
    if ENDING == _ROTATE:
        _rotate(
            acc, acc_second, cos_low, sin_low, cos_high, sin_high, slot, out_ptr, out_stride, kv_ptr, cleaned_ptr, head,
            row, column, num_rows, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
        )  # fmt: skip
    elif ENDING == _ADD:
        _add(
            acc, residual, norm, out_ptr, out_stride, scaled_ptr, squares_out_ptr, tile, row, column, num_rows,
            NUM_COLUMNS, ROWS, SWAP,
        )  # fmt: skip
    else:
        if ENDING == _SILU:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_second
        mask = (row < num_rows) & (column < NUM_COLUMNS)
        tl.store(out_ptr + row * out_stride + column, acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr, weight_ptr, weight, out_ptr, parts_ptr, arrivals_ptr, squares_ptr, norm_ptr, scaled_ptr, squares_out_ptr,
    cos_ptr, sin_ptr, slots_ptr, kv_ptr, cleaned_ptr, num_rows, x_stride, out_stride, angle_stride, eps,
    NUM_COLUMNS: tl.constexpr, NUM_IN: tl.constexpr, PART_IN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ENDING: tl.constexpr, SQUARES: tl.constexpr, SWAP: tl.constexpr,
    USE_TMA: tl.constexpr, DEPENDENT: tl.constexpr, PIECES: tl.constexpr, PIECE_BYTES: tl.constexpr,
    STAGES: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of BLOCK_N columns * SPLIT,).

    With SILU and ROTATE a program has two tiles of the weight: up's rows follow gate's NUM_COLUMNS, and the upper half
    of a head its lower half. SQUARES: parts of the squares of `ScaledRows`; 0: x is what is multiplied.
    """
    TWO: tl.constexpr = ENDING == _SILU or ENDING == _ROTATE
    LAST: tl.constexpr = NUM_COLUMNS * (2 if TWO else 1) - 1
    TO_SECOND: tl.constexpr = HEAD_DIM // 2 if ENDING == _ROTATE else NUM_COLUMNS
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    first = tile * BLOCK_N
    head = 0
    first_column = first
    if ENDING == _ROTATE:
        head = first // (HEAD_DIM // 2)
        first_column = first % (HEAD_DIM // 2)
        first += head * (HEAD_DIM // 2)
    begin = part * PART_IN
    end = tl.minimum(begin + PART_IN, NUM_IN)
    if DEPENDENT:
        if PIECES > 0:
            _prefetch(weight_ptr, first, LAST, begin, NUM_IN, BLOCK_N, PIECES, PIECE_BYTES)
            if TWO:
                _prefetch(weight_ptr, TO_SECOND + first, LAST, begin, NUM_IN, BLOCK_N, PIECES, PIECE_BYTES)
        wait_for_previous()
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_N)
    if SWAP:
        out_row, column = row[None, :], column[:, None]
        at = column * ROWS + out_row
    else:
        out_row, column = row[:, None], column[None, :]
        at = out_row * BLOCK_N + column
    # A program that ends alone asks before its sums, one that shares its tile before it announces its part; where that
    # would take too many registers, both ask when they end.
    EARLY: tl.constexpr = SPLIT == 1 and BLOCK_N * ROWS <= _MAX_EARLY
    SHARED: tl.constexpr = SPLIT > 1 and BLOCK_N * ROWS <= _MAX_EARLY // 2
    if EARLY:
        needed = _needed(
            out_ptr, out_stride, norm_ptr, cos_ptr, sin_ptr, angle_stride, slots_ptr, squares_ptr, out_row,
            first_column + column, num_rows, NUM_COLUMNS, ROWS, ENDING, SQUARES, HEAD_DIM,
        )  # fmt: skip
    acc = tl.zeros([BLOCK_N, ROWS] if SWAP else [ROWS, BLOCK_N], tl.float32)
    acc_second = tl.zeros([BLOCK_N, ROWS] if SWAP else [ROWS, BLOCK_N], tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inputs = k + tl.arange(0, BLOCK_K)[None, :]
        is_input = row[:, None] < num_rows
        if NUM_IN % BLOCK_K != 0:
            is_input &= inputs < NUM_IN
        x = tl.load(x_ptr + row[:, None] * x_stride + inputs, is_input, other=0.0)
        own = _weight_tile(weight_ptr, weight, first, LAST, k, NUM_IN, BLOCK_N, BLOCK_K, USE_TMA)
        acc = _multiply(x, own, acc, SWAP)
        if TWO:
            second = _weight_tile(weight_ptr, weight, TO_SECOND + first, LAST, k, NUM_IN, BLOCK_N, BLOCK_K, USE_TMA)
            acc_second = _multiply(x, second, acc_second, SWAP)
    if DEPENDENT:
        start_next()
    if SHARED:
        needed = _needed(
            out_ptr, out_stride, norm_ptr, cos_ptr, sin_ptr, angle_stride, slots_ptr, squares_ptr, out_row,
            first_column + column, num_rows, NUM_COLUMNS, ROWS, ENDING, SQUARES, HEAD_DIM,
        )  # fmt: skip
    is_last = True
    if SPLIT > 1:
        SIZE: tl.constexpr = ROWS * BLOCK_N
        PART_SIZE: tl.constexpr = SIZE * (2 if TWO else 1)
        parts = parts_ptr + tile * (SPLIT * PART_SIZE) + at
        tl.store(parts + part * PART_SIZE, acc)
        if TWO:
            tl.store(parts + part * PART_SIZE + SIZE, acc_second)
        tl.debug_barrier()  # all of the program's stores, before one thread announces them
        is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if is_last:
        if SPLIT > 1:
            # Written by other programs: read past the first-level cache.
            acc = tl.load(parts, cache_modifier=".cg")
            acc_second = tl.load(parts + SIZE, cache_modifier=".cg") if TWO else acc
            for other in tl.static_range(1, SPLIT):
                acc += tl.load(parts + other * PART_SIZE, cache_modifier=".cg")
                if TWO:
                    acc_second += tl.load(parts + other * PART_SIZE + SIZE, cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
        if not EARLY and not SHARED:
            needed = _needed(
                out_ptr, out_stride, norm_ptr, cos_ptr, sin_ptr, angle_stride, slots_ptr, squares_ptr, out_row,
                first_column + column, num_rows, NUM_COLUMNS, ROWS, ENDING, SQUARES, HEAD_DIM,
            )  # fmt: skip
        _end(
            acc, acc_second, needed, eps, out_ptr, out_stride, scaled_ptr, squares_out_ptr, kv_ptr, cleaned_ptr, tile,
            head, out_row, first_column + column, num_rows, NUM_COLUMNS, NUM_IN, ROWS, ENDING, SWAP, SQUARES, NUM_HEADS,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
        )  # fmt: skip
