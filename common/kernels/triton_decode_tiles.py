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
def arrive(
    acc_ptr, max_sum_ptr, out_ptr, arrivals_ptr, group_arrivals_ptr, first_program, part, num_parts, starts_earlier,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MERGED: tl.constexpr, MERGED_ROWS: tl.constexpr,
):  # fmt: skip
    """Announce a part that has been stored in its slot; who comes last merges what is there.

    Up to 2 * MERGED parts are merged into the row's output at `out_ptr` by the last of them. More form groups of
    MERGED: the last part of a group to arrive merges the group, the last group the row. Which parts meet, and in which
    order, follows from their numbers alone. arrivals_ptr: the row's counter; group_arrivals_ptr: one for each slot.
    """
    in_groups = num_parts > 2 * MERGED  # with two turns of the loop a second level would take longer than it saves
    step = tl.where(in_groups, MERGED, 1)
    num_sources = tl.cdiv(num_parts, step)
    tl.debug_barrier()  # all of the program's stores, before one thread announces them
    has_source = num_parts > 0
    if MERGED > 1:  # noqa: SIM102 - a constant, then a value of the device
        if in_groups:
            has_source = _arrive_in_group(
                acc_ptr, max_sum_ptr, group_arrivals_ptr, first_program, part // MERGED * MERGED, num_parts,
                starts_earlier, GROUP, HEAD_DIM, MERGED, MERGED_ROWS,
            )  # fmt: skip
    if has_source:  # noqa: SIM102 - the second has an effect
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_sources - 1:
            best, total, acc = _nothing(HEAD_DIM, MERGED_ROWS)
            for start in tl.range(0, num_sources, MERGED, num_stages=4):
                best, total, acc = _add_sources(
                    best, total, acc, acc_ptr, max_sum_ptr, first_program, starts_earlier, start * step, num_parts,
                    step, GROUP, HEAD_DIM, MERGED, MERGED_ROWS,
                )  # fmt: skip
            row = tl.arange(0, MERGED_ROWS)[:, None]
            safe = tl.where(total == 0.0, 1.0, total)
            tl.store(
                out_ptr + row * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :],
                (acc / safe[:, None]).to(out_ptr.dtype.element_ty),
                row < GROUP,
            )
            tl.store(arrivals_ptr, 0)


@triton.jit
def _arrive_in_group(
    acc_ptr, max_sum_ptr, group_arrivals_ptr, first_program, first_part, num_parts, starts_earlier,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MERGED: tl.constexpr, MERGED_ROWS: tl.constexpr,
):  # fmt: skip
    """Whether all parts of the group from `first_part` on have arrived: they are now merged, in that part's slot."""
    slot = _slot_of(first_part, first_program, starts_earlier)
    in_group = tl.minimum(num_parts - first_part, MERGED)
    is_last = tl.atomic_add(group_arrivals_ptr + slot, 1, sem="acq_rel") == in_group - 1
    if is_last:
        best, total, acc = _nothing(HEAD_DIM, MERGED_ROWS)
        best, total, acc = _add_sources(
            best, total, acc, acc_ptr, max_sum_ptr, first_program, starts_earlier, first_part, num_parts, 1,
            GROUP, HEAD_DIM, MERGED, MERGED_ROWS,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has read the slot that is written now
        store_part(acc_ptr, max_sum_ptr, slot, best, total, acc, GROUP, HEAD_DIM, MERGED_ROWS)
        tl.store(group_arrivals_ptr + slot, 0)
        tl.debug_barrier()  # as before a part is announced
    return is_last


@triton.jit
def store_part(
    acc_ptr, max_sum_ptr, slot, best, total, acc, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """best, total: [ROWS]; acc: [ROWS, HEAD_DIM]; of the rows the first GROUP count."""
    row = tl.arange(0, ROWS)
    at = slot * GROUP + row
    tl.store(acc_ptr + at[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], acc, row[:, None] < GROUP)
    tl.store(max_sum_ptr + at * 2, best, row < GROUP)
    tl.store(max_sum_ptr + at * 2 + 1, total, row < GROUP)


@triton.jit
def _slot_of(part, first_program, starts_earlier):
    """A part is the first of its program, but a row's first one may be its program's last instead."""
    return (first_program + part) * 2 + tl.where(part == 0, starts_earlier, 0)


@triton.jit
def _nothing(HEAD_DIM: tl.constexpr, MERGED_ROWS: tl.constexpr):
    """What merging begins with: best, total, acc."""
    best = tl.full([MERGED_ROWS], float("-inf"), tl.float32)
    return best, tl.zeros([MERGED_ROWS], tl.float32), tl.zeros([MERGED_ROWS, HEAD_DIM], tl.float32)


@triton.jit
def _add_sources(
    best, total, acc, acc_ptr, max_sum_ptr, first_program, starts_earlier, first_part, num_parts, step,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MERGED: tl.constexpr, MERGED_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge MERGED slots of parts of a row, every step-th from `first_part` on, into best, total and acc."""
    row = tl.arange(0, MERGED_ROWS)
    part = first_part + tl.arange(0, MERGED) * step
    mask = (part < num_parts)[:, None] & (row < GROUP)[None, :]
    at = _slot_of(part, first_program, starts_earlier)[:, None] * GROUP + row[None, :]
    # Written by other programs: read past the first-level cache.
    maxima = tl.load(max_sum_ptr + at * 2, mask, other=float("-inf"), cache_modifier=".cg")
    weights = tl.load(max_sum_ptr + at * 2 + 1, mask, other=0.0, cache_modifier=".cg")
    parts = tl.load(
        acc_ptr + at[:, :, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, None, :],
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
    return higher, total, acc
