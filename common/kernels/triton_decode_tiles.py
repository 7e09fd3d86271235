"""Steps of decode attention's programs: finding and loading a tile of keys, and joining the parts of a row."""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(
    tile, sequence, tile_ends_ptr, lengths_ptr, window,
    NUM_KV_HEADS: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The row of a tile of a sequence: KV head, first tile and end, context, first key, and what makes tiles keys."""
    sequence_end = tl.load(tile_ends_ptr + sequence)
    sequence_first = 0
    if sequence > 0:
        sequence_first = tl.load(tile_ends_ptr + sequence - 1)
    tiles_per_row = sequence_end - sequence_first
    head = (tile - sequence_first * NUM_KV_HEADS) // tiles_per_row
    row_first = sequence_first * NUM_KV_HEADS + head * tiles_per_row
    length = tl.load(lengths_ptr + sequence)
    first_key = 0
    if WINDOWED:
        first_key = tl.maximum(length - window, 0)
    return head, row_first, row_first + tiles_per_row, length, first_key, first_key // TILE - row_first


@triton.jit
def load_tile(
    kv, tables_ptr, block_row, key, head, WHICH: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Keys [key, key + TILE) of one head, [TILE, HEAD_DIM]. WHICH: 0 for K, 1 for V."""
    if USE_TMA:
        block = tl.load(tables_ptr + block_row + key // BLOCK_SIZE)
        tile = kv.load([((block * 2 + WHICH) * NUM_KV_HEADS + head) * BLOCK_SIZE, 0])
    else:
        keys = key + tl.arange(0, TILE)
        if TILE == BLOCK_SIZE:
            blocks = tl.load(tables_ptr + block_row + key // BLOCK_SIZE).to(tl.int64)
        else:
            blocks = tl.load(tables_ptr + block_row + keys // BLOCK_SIZE).to(tl.int64)
        rows = ((blocks * 2 + WHICH) * NUM_KV_HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        tile = tl.load(kv + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :])
    return tile


@triton.jit
def program_of(tile, share, longer):
    """Which program's share holds the tile: the first `longer` shares have one tile more."""
    long_end = longer * (share + 1)
    in_long = tile // (share + 1)
    in_short = longer + (tile - long_end) // tl.maximum(share, 1)
    return tl.where(tile < long_end, in_long, in_short)


@triton.jit
def merge(
    acc_ptr, max_sum_ptr, out_ptr, first_program, num_parts, starts_earlier,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MERGED: tl.constexpr, MERGED_ROWS: tl.constexpr,
):  # fmt: skip
    """Join the parts of a row. Each is the first of its program; the first one may be its program's last instead."""
    row = tl.arange(0, MERGED_ROWS)
    dim = tl.arange(0, HEAD_DIM)
    best = tl.full([MERGED_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([MERGED_ROWS], tl.float32)
    acc = tl.zeros([MERGED_ROWS, HEAD_DIM], tl.float32)
    for start in tl.range(0, num_parts, MERGED, num_stages=4):
        part = start + tl.arange(0, MERGED)
        slot = (first_program + part) * 2 + tl.where(part == 0, starts_earlier, 0)
        mask = (part < num_parts)[:, None] & (row < GROUP)[None, :]
        at = slot[:, None] * GROUP + row[None, :]
        # Written by other programs: read past the first-level cache.
        maxima = tl.load(max_sum_ptr + at * 2, mask, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(max_sum_ptr + at * 2 + 1, mask, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            acc_ptr + at[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(best, tl.max(maxima, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        factors = tl.exp2(maxima - anchor[None, :])
        kept = tl.exp2(best - anchor)
        total = total * kept + tl.sum(weights * factors, 0)
        acc = acc * kept[:, None] + tl.sum(parts * factors[:, :, None], 0)
        best = higher
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + row[:, None] * HEAD_DIM + dim[None, :],
        (acc / safe[:, None]).to(out_ptr.dtype.element_ty),
        (row < GROUP)[:, None],
    )
