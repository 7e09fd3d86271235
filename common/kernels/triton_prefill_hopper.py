"""Prefill attention over KV blocks for Hopper, in Gluon (Triton's lower level): the fast form of `triton_prefill`.

One warp streams K and V into shared memory with the bulk tensor copy engine; two groups of four warps each own half of
a tile's rows. While a group's softmax runs, its product with the previous V and the other group's products keep the
tensor cores busy: the overlap that FlashAttention-3 describes (Shah et al., 2024). Programs are persistent and take
tiles in alternating order, longest first.
"""
# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from common.kernels.triton_device import LOG2_E, is_hopper, num_multiprocessors
from common.kernels.triton_prefill import PrefillBatch

_ROWS: Final = 128
_KEYS: Final = 128
_COLUMNS: Final = 64  # a swizzled row of shared memory: 128 bytes
_GL_DTYPES: Final = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def supports(q: torch.Tensor, kv_layer: torch.Tensor) -> bool:
    """Whether `prefill_attention` takes these."""
    block_size, head_dim = kv_layer.shape[3:]
    return (
        is_hopper(kv_layer.device)
        and kv_layer.dtype in _GL_DTYPES
        and q.dtype == kv_layer.dtype
        and block_size in (64, 128)
        and head_dim in (64, 128)
        and q.shape[1] // kv_layer.shape[2] <= _ROWS // 2
    )


def tile_queries(num_heads: int, kv_layer: torch.Tensor) -> int:
    """Queries in a tile: the same number for each half. kv_layer: as for `prefill_attention`."""
    return _ROWS // 2 // (num_heads // kv_layer.shape[2]) * 2


def prefill_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    batch: PrefillBatch,
    window: int | None,
    scale: float,
    out: torch.Tensor,
    num_stages: int = 2,
) -> None:
    """As `triton_prefill.prefill_attention`."""
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    group = num_heads // num_kv_heads
    tiles = batch.tiles(tile_queries(num_heads, kv_layer))
    num_items = tiles.shape[0] * num_kv_heads
    num_programs = min(num_multiprocessors(kv_layer.device), num_items)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = kv_layer.view(-1, head_dim)
    piece = min(block_size, _KEYS)
    descriptor = TensorDescriptor(keys, list(keys.shape), [head_dim, 1], [piece, _COLUMNS], layout)
    _hopper_kernel[(num_programs,)](
        q, descriptor, batch.block_tables, tiles, out, q.stride(0), batch.block_tables.stride(0), num_items,
        window or 0, scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, ROWS=_ROWS, KEYS=_KEYS,
        PIECE=piece, COLUMNS=_COLUMNS, STAGES=num_stages, WINDOWED=window is not None, DTYPE=_GL_DTYPES[q.dtype],
        num_warps=4,
    )  # fmt: skip


@gluon.jit
def _item_of(round_, NUM_ROUND_PROGRAMS):
    """The item that this program takes in a round: odd rounds run backwards, so that shares even out."""
    program = gl.program_id(0)
    backwards = NUM_ROUND_PROGRAMS - 1 - program
    return round_ * NUM_ROUND_PROGRAMS + gl.where(round_ % 2 == 0, program, backwards)


@gluon.jit
def _key_tiles(first_position, num_queries, window, KEYS: gl.constexpr, WINDOWED: gl.constexpr):
    """First key tile, one past the last."""
    last = (first_position + num_queries + KEYS - 1) // KEYS
    first = 0
    if WINDOWED:
        first = gl.maximum(first_position + 1 - window, 0) // KEYS
    return first, last


@gluon.jit
def _producer(
    kv, tables_ptr, tiles_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, table_stride, num_items, window,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
    PIECE: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Last keys first: they hold the diagonal."""
    PIECES: gl.constexpr = KEYS // PIECE
    HALVES: gl.constexpr = HEAD_DIM // COLUMNS
    count = 0
    num_programs = gl.num_programs(0)
    for round_ in range(gl.cdiv(num_items, num_programs)):
        item = _item_of(round_, num_programs)
        if item < num_items:
            head = item % NUM_KV_HEADS
            tile_ptr = tiles_ptr + item // NUM_KV_HEADS * 4
            table_ptr = tables_ptr + gl.load(tile_ptr) * table_stride
            first, last = _key_tiles(gl.load(tile_ptr + 2), gl.load(tile_ptr + 3), window, KEYS, WINDOWED)
            for back in range(last - first):
                key = (last - 1 - back) * KEYS
                stage = count % STAGES
                phase = (count // STAGES) & 1 ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), KEYS * HEAD_DIM * 2)
                k_pieces = k_smem.index(stage)._reinterpret(DTYPE, [PIECES * HALVES, PIECE, COLUMNS], LAYOUT)
                for piece in gl.static_range(PIECES):
                    at = key + piece * PIECE
                    row = ((gl.load(table_ptr + at // BLOCK_SIZE) * 2) * NUM_KV_HEADS + head) * BLOCK_SIZE
                    for half in gl.static_range(HALVES):
                        tma.async_copy_global_to_shared(
                            kv, [row + at % BLOCK_SIZE, half * COLUMNS], k_full.index(stage),
                            k_pieces.index(half * PIECES + piece),
                        )  # fmt: skip
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), KEYS * HEAD_DIM * 2)
                v_pieces = v_smem.index(stage)._reinterpret(DTYPE, [PIECES * HALVES, PIECE, COLUMNS], LAYOUT)
                for piece in gl.static_range(PIECES):
                    at = key + piece * PIECE
                    row = ((gl.load(table_ptr + at // BLOCK_SIZE) * 2 + 1) * NUM_KV_HEADS + head) * BLOCK_SIZE
                    for half in gl.static_range(HALVES):
                        tma.async_copy_global_to_shared(
                            kv, [row + at % BLOCK_SIZE, half * COLUMNS], v_full.index(stage),
                            v_pieces.index(half * PIECES + piece),
                        )  # fmt: skip
                count += 1


@gluon.jit
def _softmax_step(
    scores, best, sums, key, positions, window, qk_scale,
    MASKED: gl.constexpr, WINDOWED: gl.constexpr, KEYS: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Returns the weights, the new maximum and sum, and the factor by which earlier sums shrink."""
    if MASKED:
        keys = key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S_LAYOUT))
        visible = keys[None, :] <= positions[:, None]
        if WINDOWED:
            visible = visible & (keys[None, :] > positions[:, None] - window)
        scores = gl.where(visible, scores, float("-inf"))
    higher = gl.maximum(best, gl.max(scores, 1))
    anchor = higher
    if MASKED:  # a row may have seen no key yet
        anchor = gl.where(higher == float("-inf"), 0.0, higher)
    scaled = anchor * qk_scale
    weights = gl.exp2(scores * qk_scale - scaled[:, None])
    kept = gl.exp2(best * qk_scale - scaled)
    return weights, higher, sums * kept + gl.sum(weights, 1), kept


@gluon.jit
def _steps(
    first_tile, num_tiles, count, acc, weights, best, sums, positions, q_smem, k_smem, v_smem, k_full, k_empty, v_full,
    v_empty, window, qk_scale,
    MASKED: gl.constexpr, WINDOWED: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HALF_ROWS: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Key tiles first_tile, first_tile - 1, …; each adds the previous tile's weights times V while its softmax runs."""
    for back in range(num_tiles):
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        zero = gl.zeros([HALF_ROWS, KEYS], gl.float32, S_LAYOUT)
        scores = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        before = (count - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((count - 1) // STAGES) & 1)
        acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        new_weights, best, sums, kept = _softmax_step(
            scores,
            best,
            sums,
            (first_tile - back) * KEYS,
            positions,
            window,
            qk_scale,
            MASKED,
            WINDOWED,
            KEYS,
            S_LAYOUT,
        )
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, acc.type.layout))[:, None]
        weights = gl.convert_layout(new_weights.to(DTYPE), P_LAYOUT)
        count += 1
    return count, acc, weights, best, sums


@gluon.jit
def _consumer(
    q_ptr, tiles_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, q_stride, num_items, window,
    qk_scale,
    SIDE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    HALF_ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """SIDE: which half of a tile's queries."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    LANES: gl.constexpr = HEAD_DIM // 8
    IO_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    QUERIES: gl.constexpr = HALF_ROWS // GROUP
    count = 0
    num_programs = gl.num_programs(0)
    for round_ in range(gl.cdiv(num_items, num_programs)):
        item = _item_of(round_, num_programs)
        if item < num_items:
            head = item % NUM_KV_HEADS
            tile_ptr = tiles_ptr + item // NUM_KV_HEADS * 4
            first_row = gl.load(tile_ptr + 1).to(gl.int64)
            first_position = gl.load(tile_ptr + 2)
            num_queries = gl.load(tile_ptr + 3)
            first, last = _key_tiles(first_position, num_queries, window, KEYS, WINDOWED)
            row = gl.arange(0, HALF_ROWS, layout=gl.SliceLayout(1, IO_LAYOUT))
            dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, IO_LAYOUT))
            own_query = SIDE * QUERIES + row // GROUP
            # Rows past the last query repeat it, so that every row sees a key.
            query = gl.minimum(own_query, num_queries - 1)
            column = (head * GROUP + row % GROUP) * HEAD_DIM
            q = gl.load(q_ptr + ((first_row + query) * q_stride + column)[:, None] + dim[None, :])
            q_smem.store(q)
            fence_async_shared()
            s_row = gl.arange(0, HALF_ROWS, layout=ROW_LAYOUT)
            positions = first_position + gl.minimum(SIDE * QUERIES + s_row // GROUP, num_queries - 1)
            best = gl.full([HALF_ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
            sums = gl.zeros([HALF_ROWS], gl.float32, ROW_LAYOUT)
            acc = gl.zeros([HALF_ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            zero = gl.zeros([HALF_ROWS, KEYS], gl.float32, S_LAYOUT)
            scores = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            weights, best, sums, _ = _softmax_step(
                scores, best, sums, (last - 1) * KEYS, positions, window, qk_scale, True, WINDOWED, KEYS, S_LAYOUT
            )
            weights = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
            count += 1
            # Tiles before `full` are visible to every row.
            full = gl.minimum((first_position + 1) // KEYS, last - 1)
            if WINDOWED:
                full = first
            count, acc, weights, best, sums = _steps(
                last - 2, last - 1 - full, count, acc, weights, best, sums, positions, q_smem, k_smem, v_smem, k_full,
                k_empty, v_full, v_empty, window, qk_scale, True, WINDOWED, KEYS, STAGES, HALF_ROWS, S_LAYOUT, P_LAYOUT,
                DTYPE,
            )  # fmt: skip
            if not WINDOWED:
                count, acc, weights, best, sums = _steps(
                    full - 1, full - first, count, acc, weights, best, sums, positions, q_smem, k_smem, v_smem, k_full,
                    k_empty, v_full, v_empty, window, qk_scale, False, WINDOWED, KEYS, STAGES, HALF_ROWS, S_LAYOUT,
                    P_LAYOUT, DTYPE,
                )  # fmt: skip
            before = (count - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((count - 1) // STAGES) & 1)
            acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(before), count=1)
            inverse = gl.convert_layout(1.0 / sums, gl.SliceLayout(1, O_LAYOUT))
            q_smem.store((acc * inverse[:, None]).to(DTYPE))
            result = q_smem.load(IO_LAYOUT)
            at = (first_row + query) * (NUM_KV_HEADS * GROUP * HEAD_DIM) + column
            own = (own_query < num_queries) & (row < QUERIES * GROUP)
            gl.store(out_ptr + at[:, None] + dim[None, :], result, own[:, None])


@gluon.jit
def _hopper_kernel(
    q_ptr, kv, tables_ptr, tiles_ptr, out_ptr, q_stride, table_stride, num_items, window, qk_scale,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Grid: up to one program per multiprocessor. Barriers count the arrivals of both consumers, one each."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    HALF_ROWS: gl.constexpr = ROWS // 2
    q0_smem = gl.allocate_shared_memory(DTYPE, [HALF_ROWS, HEAD_DIM], LAYOUT)
    q1_smem = gl.allocate_shared_memory(DTYPE, [HALF_ROWS, HEAD_DIM], LAYOUT)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, HEAD_DIM], LAYOUT)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, HEAD_DIM], LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_ptr, tiles_ptr, out_ptr, q0_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, q_stride,
                    num_items, window, qk_scale, 0, NUM_KV_HEADS, GROUP, HEAD_DIM, HALF_ROWS, KEYS, STAGES, WINDOWED,
                    DTYPE,
                ),
            ),
            (
                _consumer,
                (
                    q_ptr, tiles_ptr, out_ptr, q1_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, q_stride,
                    num_items, window, qk_scale, 1, NUM_KV_HEADS, GROUP, HEAD_DIM, HALF_ROWS, KEYS, STAGES, WINDOWED,
                    DTYPE,
                ),
            ),
            (
                _producer,
                (
                    kv, tables_ptr, tiles_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, table_stride,
                    num_items, window, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, PIECE, COLUMNS, STAGES, WINDOWED,
                    DTYPE, LAYOUT,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
