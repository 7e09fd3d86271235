"""Triton attention of prefill chunks over KV blocks: ragged, causal, over a cached prefix, grouped heads in one tile.

A tile is `rows` rows: some consecutive queries of one sequence, with all query heads that share a KV head. Tiles are
made on the host, longest first, so that the last ones to finish are short.
"""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from common.kernels.batch import Span
from common.kernels.triton_device import LOG2_E
from common.kernels.upload import upload

# Takes a place in a table of tiles and writes nothing: no query, one step of keys of the first span.
EMPTY_TILE: Final = (0, 1, 1, 0)


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """Choices that change speed alone."""

    rows: int  # queries times grouped heads in a tile
    keys: int  # per iteration
    num_warps: int
    num_stages: int
    use_tma: bool  # bulk tensor copies; needs keys == block size
    heads_outermost: bool  # all tiles of a KV head before those of the next


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """The prefill spans of a step."""

    spans: tuple[tuple[int, Span], ...]  # with the row of their first query in q
    block_tables: torch.Tensor  # [n, max blocks] int32; entries past the context must name some block
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict)

    def tiles(self, queries: int) -> torch.Tensor:
        """Tiles of up to `queries` queries; made once per step, as all layers cut alike.

        [num_tiles, 4] int32: span, row of the first query in q, its position, number of queries.
        """
        tiles = self._tiles.get(queries)
        if tiles is None:
            table = np.array(make_tiles(self.spans, queries), dtype=np.int32)
            (tiles,) = upload([table], self.block_tables.device)
            self._tiles[queries] = tiles
        return tiles


def default_tuning(block_size: int, head_dim: int, dtype: torch.dtype) -> PrefillTuning:
    """What measured best on H200."""
    wide = dtype == torch.float32 or head_dim > 128
    use_tma = block_size == 64 and not wide and head_dim >= 64
    return PrefillTuning(
        rows=64 if wide else 128,
        keys=max(block_size, 32) if wide else max(block_size, 64 if use_tma else 128),
        num_warps=4 if wide else 8,
        num_stages=2 if wide else 3,
        use_tma=use_tma,
        heads_outermost=False,
    )


def make_tiles(spans: Sequence[tuple[int, Span]], queries: int) -> list[tuple[int, int, int, int]]:
    """Cut spans, given with the row of their first query, into tiles, the one with most keys first."""
    tiles = [
        (
            number,
            first_row + start,
            span.context_length - span.num_queries + start,
            min(queries, span.num_queries - start),
        )
        for number, (first_row, span) in enumerate(spans)
        for start in range(0, span.num_queries, queries)
    ]
    return sorted(tiles, key=lambda tile: tile[2], reverse=True)


def tile_queries(num_heads: int, kv_layer: torch.Tensor) -> int:
    """Queries in a tile. kv_layer: as for `prefill_attention`."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    return default_tuning(block_size, head_dim, kv_layer.dtype).rows // (num_heads // num_kv_heads)


def prefill_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    batch: PrefillBatch,
    window: int | None,
    scale: float,
    out: torch.Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """Write the attention of the batch's queries to the same rows of `out`.

    q: [T, num_heads, head_dim], heads contiguous; kv_layer: [num_blocks, 2, num_kv_heads, block_size, head_dim];
    out: [T, num_heads * head_dim]. Tokens outside a context are masked but read: they must be finite.
    """
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    tuning = tuning or default_tuning(block_size, head_dim, kv_layer.dtype)
    keys = kv_layer.view(-1, head_dim)
    group = num_heads // num_kv_heads
    tiles = batch.tiles(tuning.rows // group)
    num_tiles = tiles.shape[0]
    _prefill_kernel[(num_tiles * num_kv_heads,)](
        q,
        TensorDescriptor(keys, list(keys.shape), [head_dim, 1], [tuning.keys, head_dim]) if tuning.use_tma else keys,
        batch.block_tables, tiles, out, q.stride(0), batch.block_tables.stride(0), num_tiles, window or 0,
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, ROWS=tuning.rows, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, KEYS=tuning.keys, WINDOWED=window is not None, USE_TMA=tuning.use_tma,
        HEADS_OUTERMOST=tuning.heads_outermost, num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip


@triton.jit
def _load_keys(
    kv, table_ptr, key, head, WHICH: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Keys [key, key + KEYS) of one head, [KEYS, HEAD_DIM]. WHICH: 0 for K, 1 for V."""
    if USE_TMA:
        block = tl.load(table_ptr + key // BLOCK_SIZE)
        loaded = kv.load([((block * 2 + WHICH) * NUM_KV_HEADS + head) * BLOCK_SIZE, 0])
    else:
        keys = key + tl.arange(0, KEYS)
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
        rows = ((blocks * 2 + WHICH) * NUM_KV_HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        loaded = tl.load(kv + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :])
    return loaded


@triton.jit
def _attend(
    q, acc, best, sums, kv, table_ptr, first_key, last_key, positions, head, window, qk_scale,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [first_key, last_key) in steps of KEYS."""
    for key in tl.range(first_key, last_key, KEYS):
        k = _load_keys(kv, table_ptr, key, head, 0, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, USE_TMA)
        v = _load_keys(kv, table_ptr, key, head, 1, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, USE_TMA)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            keys = key + tl.arange(0, KEYS)[None, :]
            visible = keys <= positions[:, None]
            if WINDOWED:
                visible &= keys > positions[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1) * qk_scale)
        anchor = higher
        if WINDOWED:  # a row may see no key of this step, nor of those before
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * qk_scale - anchor[:, None])
        kept = tl.exp2(best - anchor)
        sums = sums * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        best = higher
    return acc, best, sums


@triton.jit
def _prefill_kernel(
    q_ptr, kv, tables_ptr, tiles_ptr, out_ptr, q_stride, table_stride, num_tiles, window, qk_scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, USE_TMA: tl.constexpr,
    HEADS_OUTERMOST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * KV heads,)."""
    program = tl.program_id(0)
    if HEADS_OUTERMOST:
        head = program // num_tiles
        tile_ptr = tiles_ptr + program % num_tiles * 4
    else:
        head = program % NUM_KV_HEADS
        tile_ptr = tiles_ptr + program // NUM_KV_HEADS * 4
    span = tl.load(tile_ptr)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    first_position = tl.load(tile_ptr + 2)
    num_queries = tl.load(tile_ptr + 3)
    row = tl.arange(0, ROWS)
    # Rows past the last query repeat it, so that every row of the tile sees a key.
    query = tl.minimum(row // GROUP, num_queries - 1)
    member = row % GROUP
    dim = tl.arange(0, HEAD_DIM)
    rows = first_row + query
    q = tl.load(q_ptr + (rows * q_stride + (head * GROUP + member) * HEAD_DIM)[:, None] + dim[None, :])
    positions = first_position + query
    best = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    table_ptr = tables_ptr + span * table_stride
    last_key = first_position + num_queries
    if WINDOWED:
        first_key = tl.maximum(first_position + 1 - window, 0) // KEYS * KEYS
        acc, best, sums = _attend(
            q, acc, best, sums, kv, table_ptr, first_key, last_key, positions, head, window, qk_scale,
            True, True, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, USE_TMA,
        )  # fmt: skip
    else:
        full_end = (first_position + 1) // KEYS * KEYS  # keys before this are visible to every row
        acc, best, sums = _attend(
            q, acc, best, sums, kv, table_ptr, 0, full_end, positions, head, window, qk_scale,
            False, False, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, USE_TMA,
        )  # fmt: skip
        acc, best, sums = _attend(
            q, acc, best, sums, kv, table_ptr, full_end, last_key, positions, head, window, qk_scale,
            True, False, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, USE_TMA,
        )  # fmt: skip
    tl.store(
        out_ptr
        + (rows * (NUM_KV_HEADS * GROUP * HEAD_DIM) + (head * GROUP + member) * HEAD_DIM)[:, None]
        + dim[None, :],
        (acc / sums[:, None]).to(out_ptr.dtype.element_ty),
        (row < num_queries * GROUP)[:, None],
    )
