"""Triton decode attention over KV blocks: one query per sequence, the KV of the batch cut into equal shares.

The keys of all (sequence, KV head) rows form one line of tiles; each program takes the same length of that line,
whatever the lengths of the sequences, so the grid is static and lengths and block tables are read on the device: a
launch can be captured into a CUDA graph. A row that several programs share is merged by the last of them to finish, in
two levels if they are many, and always in the same order.
"""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from common.errors import InternalError
from common.kernels.dependent_launch import is_dependent, launch_options, start_next, wait_for_previous
from common.kernels.triton_decode_tiles import arrive, load_tile, program_of, row_of, store_part
from common.kernels.triton_device import LOG2_E, current_stream, num_multiprocessors

_MIN_DOT_ROWS: Final = 16
_MERGED_VALUES_PER_THREAD: Final = 64  # of partial results loaded in one go


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """Choices that change speed alone."""

    tile: int  # keys
    programs_per_multiprocessor: int
    num_warps: int
    num_stages: int
    min_tiles: int  # per program, while there are fewer tiles than programs could take
    use_tma: bool  # bulk tensor copies; needs tile == block size


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The sequences of a decode step. Tensors may be overwritten between replays of a captured graph.

    `tile_ends` and `store_slots` follow from the others: `refresh` computes them on the device, once per step.
    """

    query_rows: torch.Tensor  # [n] int32 into the batch's tokens
    block_tables: torch.Tensor  # [n, max blocks] int32; entries past the context must name some block
    context_lengths: torch.Tensor  # [n] int32; 0: a padding row, whose output is 0
    tile_ends: dict[int | None, torch.Tensor]  # by window: [n] int32, running count of tiles per KV head
    store_slots: torch.Tensor  # [n] int64: where the last token's K and V go; -1 for padding rows


@dataclass(frozen=True, slots=True)
class _Workspace:
    """What programs leave for each other; one per device and stream, as launches on a stream follow each other."""

    acc: torch.Tensor  # float32
    max_sum: torch.Tensor  # float32
    arrivals: torch.Tensor  # by row: int32, zero between launches
    group_arrivals: torch.Tensor  # by slot: the same


def default_tuning(block_size: int, head_dim: int, dtype: torch.dtype) -> DecodeTuning:
    """What measured best on H200."""
    use_tma = block_size == 64 and dtype != torch.float32 and head_dim >= 64
    return DecodeTuning(
        tile=max(block_size, 64 if head_dim <= 128 else 32),
        programs_per_multiprocessor=4,
        num_warps=2,
        num_stages=3,
        min_tiles=2,
        use_tma=use_tma,
    )


def num_merged(group: int, head_dim: int, num_warps: int) -> int:
    """How many parts of a row are merged in one go; more than twice as many are merged in two levels."""
    values_per_part: int = triton.next_power_of_2(group) * head_dim
    return max(1, _MERGED_VALUES_PER_THREAD * 32 * num_warps // values_per_part)


def refresh(batch: DecodeBatch, block_size: int, tile: int) -> None:
    """Recompute what follows from lengths and tables: one small kernel per window."""
    num_sequences = batch.block_tables.shape[0]
    for window, tile_ends in batch.tile_ends.items():
        _refresh_kernel[(1,)](
            batch.context_lengths, batch.block_tables, tile_ends, batch.store_slots, num_sequences,
            batch.block_tables.stride(0), window or 0,
            SEQUENCES=triton.next_power_of_2(num_sequences), TILE=tile, BLOCK_SIZE=block_size,
            WINDOWED=window is not None, num_warps=4,
        )  # fmt: skip


def decode_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    batch: DecodeBatch,
    window: int | None,
    scale: float,
    out: torch.Tensor,
    tuning: DecodeTuning | None = None,
) -> None:
    """Write the attention of the batch's rows of q to the same rows of `out`.

    q: [T, num_heads, head_dim], heads contiguous; kv_layer: [num_blocks, 2, num_kv_heads, block_size, head_dim];
    out: [T, num_heads * head_dim]. Tokens outside a context are masked but read: they must be finite.
    """
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    tuning = tuning or default_tuning(block_size, head_dim, kv_layer.dtype)
    num_sequences = batch.block_tables.shape[0]
    num_programs = num_multiprocessors(kv_layer.device) * tuning.programs_per_multiprocessor
    group = num_heads // num_kv_heads
    space = _workspace(
        kv_layer.device, current_stream(kv_layer.device), num_programs, group * head_dim, num_sequences * num_kv_heads
    )
    keys = kv_layer.view(-1, head_dim)
    merged_rows = triton.next_power_of_2(group)
    dependent = is_dependent(q.shape[0], q.device)
    _decode_kernel[(num_programs,)](
        q,
        TensorDescriptor(keys, list(keys.shape), [head_dim, 1], [tuning.tile, head_dim]) if tuning.use_tma else keys,
        batch.block_tables, batch.context_lengths, batch.tile_ends[window], batch.query_rows, out, space.acc,
        space.max_sum, space.arrivals, space.group_arrivals, q.stride(0), batch.block_tables.stride(0), num_sequences,
        window or 0, scale * LOG2_E,
        SEQUENCES=triton.next_power_of_2(num_sequences), NUM_KV_HEADS=num_kv_heads, GROUP=group,
        ROWS=max(_MIN_DOT_ROWS, merged_rows), HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE=tuning.tile,
        WINDOWED=window is not None, USE_TMA=tuning.use_tma, MIN_TILES=tuning.min_tiles,
        MERGED=num_merged(group, head_dim, tuning.num_warps), MERGED_ROWS=merged_rows, DEPENDENT=dependent,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages, **launch_options(dependent),
    )  # fmt: skip


_WORKSPACES: dict[tuple[torch.device, int], _Workspace] = {}


def _workspace(device: torch.device, stream: int, num_programs: int, row_elements: int, num_rows: int) -> _Workspace:
    """Grown when needed, kept otherwise: a captured graph keeps using the tensors it was captured with."""
    space = _WORKSPACES.get((device, stream))
    num_elements = 2 * num_programs * row_elements
    if (
        space is None
        or space.acc.numel() < num_elements
        or space.arrivals.numel() < num_rows
        or space.group_arrivals.numel() < 2 * num_programs
    ):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InternalError("decode attention must run once before it is captured, to have a cleared workspace")
        space = _Workspace(
            acc=torch.empty(num_elements, dtype=torch.float32, device=device),
            max_sum=torch.empty(num_elements, dtype=torch.float32, device=device),
            arrivals=torch.zeros(max(num_rows, 4096), dtype=torch.int32, device=device),
            group_arrivals=torch.zeros(2 * num_programs, dtype=torch.int32, device=device),
        )
        _WORKSPACES[device, stream] = space
        _KEPT.append(space)
    return space


_KEPT: list[_Workspace] = []  # captured graphs hold addresses, not references


@triton.jit
def _refresh_kernel(
    lengths_ptr, tables_ptr, tile_ends_ptr, slots_ptr, num_sequences, table_stride, window,
    SEQUENCES: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Grid: (1,)."""
    sequence = tl.arange(0, SEQUENCES)
    mask = sequence < num_sequences
    length = tl.load(lengths_ptr + sequence, mask, other=0)
    first_tile = tl.zeros_like(length)
    if WINDOWED:
        first_tile = tl.maximum(length - window, 0) // TILE
    # A padding row has one tile, all masked, so that its output is written.
    tiles = tl.where(mask, tl.maximum((length + TILE - 1) // TILE - first_tile, 1), 0)
    tl.store(tile_ends_ptr + sequence, tl.cumsum(tiles, 0), mask)
    last = length - 1
    block = tl.load(tables_ptr + sequence * table_stride + last // BLOCK_SIZE, mask & (length > 0), other=0)
    slot = tl.where(length > 0, block.to(tl.int64) * BLOCK_SIZE + last % BLOCK_SIZE, -1)
    tl.store(slots_ptr + sequence, slot, mask)


@triton.jit
def _decode_kernel(
    q_ptr, kv, tables_ptr, lengths_ptr, tile_ends_ptr, query_rows_ptr, out_ptr, acc_ptr, max_sum_ptr,
    arrivals_ptr, group_arrivals_ptr, q_stride, table_stride, num_sequences, window, qk_scale,
    SEQUENCES: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, USE_TMA: tl.constexpr,
    MIN_TILES: tl.constexpr, MERGED: tl.constexpr, MERGED_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. Slot 2p holds program p's first row if that goes on elsewhere, 2p + 1 its last.

    Lengths, tables and what follows from them are read before waiting: they were written at the start of the step,
    before the product that has waited since.
    """
    if DEPENDENT:
        start_next()
    program = tl.program_id(0)
    total = tl.load(tile_ends_ptr + num_sequences - 1) * NUM_KV_HEADS
    num_programs = tl.minimum(tl.num_programs(0), tl.maximum(total // MIN_TILES, 1))
    # Program p's share starts at tile p * share + min(p, longer): `longer` programs have one tile more.
    share = total // num_programs
    longer = total % num_programs
    tile = program * share + tl.minimum(program, longer)
    end = tile + share + (program < longer).to(tl.int32)
    first_of_program = tile
    if program >= num_programs:
        end = tile
    sequences = tl.arange(0, SEQUENCES)
    ends = tl.load(tile_ends_ptr + sequences, sequences < num_sequences, other=0)
    sequence = tl.sum(((sequences < num_sequences) & (ends * NUM_KV_HEADS <= tile)).to(tl.int32))
    sequence = tl.minimum(sequence, num_sequences - 1)  # of programs without a share
    head, row_first, row_end, length, first_key, base_tile = row_of(
        tile, sequence, tile_ends_ptr, lengths_ptr, window, NUM_KV_HEADS, TILE, WINDOWED
    )
    query_row = tl.load(query_rows_ptr + sequence).to(tl.int64)
    if DEPENDENT:  # noqa: SIM102 - a constant, then a value of the device
        # Programs without a share end at once, which lets the next kernel start: the first one always waits.
        if tile < end:
            wait_for_previous()
    row_of_dot = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    while tile < end:
        stop = tl.minimum(end, row_end)
        q = tl.load(
            q_ptr + query_row * q_stride + (head * GROUP + row_of_dot[:, None]) * HEAD_DIM + dim[None, :],
            row_of_dot[:, None] < GROUP,
            other=0.0,
        )
        best = tl.full([ROWS], float("-inf"), tl.float32)
        # One sum per key column: reduced once at the end, not once per tile.
        sums = tl.zeros([ROWS, TILE], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        table_row = sequence * table_stride
        for number in tl.range(tile, stop):
            key = (base_tile + number) * TILE
            k = load_tile(kv, tables_ptr, table_row, key, head, 0, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, USE_TMA)
            v = load_tile(kv, tables_ptr, table_row, key, head, 1, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, USE_TMA)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            keys = key + tl.arange(0, TILE)[None, :]
            visible = keys < length
            if WINDOWED:
                visible &= keys >= first_key
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - anchor[:, None])
            kept = tl.exp2(best - anchor)
            sums = sums * kept[:, None] + weights
            acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
            best = higher
        # The row after this one, if there is one: asked for before this one is written.
        next_sequence = sequence + ((stop == row_end) & (head == NUM_KV_HEADS - 1)).to(tl.int32)
        next_sequence = tl.minimum(next_sequence, num_sequences - 1)
        next_head, next_first, next_end, next_length, next_first_key, next_base = row_of(
            stop, next_sequence, tile_ends_ptr, lengths_ptr, window, NUM_KV_HEADS, TILE, WINDOWED
        )
        next_query_row = tl.load(query_rows_ptr + next_sequence).to(tl.int64)
        total_weight = tl.sum(sums, 1)
        out_at = query_row * (NUM_KV_HEADS * GROUP * HEAD_DIM) + head * (GROUP * HEAD_DIM)
        if (tile == row_first) & (stop == row_end):
            safe = tl.where(total_weight == 0.0, 1.0, total_weight)
            tl.store(
                out_ptr + out_at + row_of_dot[:, None] * HEAD_DIM + dim[None, :],
                (acc / safe[:, None]).to(out_ptr.dtype.element_ty),
                row_of_dot[:, None] < GROUP,
            )
        else:
            slot = program * 2 + (tile > first_of_program).to(tl.int32)
            store_part(acc_ptr, max_sum_ptr, slot, best, total_weight, acc, GROUP, HEAD_DIM, ROWS)
            first_program = program_of(row_first, share, longer)
            num_parts = program_of(row_end - 1, share, longer) - first_program + 1
            starts_earlier = (first_program * share + tl.minimum(first_program, longer)) < row_first
            arrive(
                acc_ptr, max_sum_ptr, out_ptr + out_at, arrivals_ptr + sequence * NUM_KV_HEADS + head,
                group_arrivals_ptr, first_program, program - first_program, num_parts, starts_earlier.to(tl.int32),
                GROUP, HEAD_DIM, MERGED, MERGED_ROWS,
            )  # fmt: skip
        tile, sequence, query_row = stop, next_sequence, next_query_row
        head, row_first, row_end = next_head, next_first, next_end
        length, first_key, base_tile = next_length, next_first_key, next_base
