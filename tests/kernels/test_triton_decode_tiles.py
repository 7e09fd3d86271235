"""Which tiles decode attention asks for ahead of their row: a wrong one would change nothing but speed."""

# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from common.kernels import triton_backend
from common.kernels.batch import KVShape
from common.kernels.triton_decode import refresh
from common.kernels.triton_decode_tiles import row_of, tiles_from

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, HEADS, HEAD_DIM = 16, 3, 32
NUM_TILES, NUM_INDICES = 2, 8
CONTEXTS = [70, 16, 200, 17]


@triton.jit
def _read_kernel(
    kv_ptr, tables_ptr, table_stride, tile_ends_ptr, lengths_ptr, window, sequence, tile, end, out_ptr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr,
    NUM_TILES: tl.constexpr, NUM_INDICES: tl.constexpr,
):  # fmt: skip
    """Grid: (1,). The first element of each tile; -1 for those that do not count."""
    index = tl.arange(0, NUM_INDICES)
    head, _, row_end, _, _, base_tile = row_of(
        tile, sequence, tile_ends_ptr, lengths_ptr, window, NUM_KV_HEADS, TILE, WINDOWED
    )
    at, counts = tiles_from(
        index, kv_ptr, tables_ptr + sequence * table_stride, head, base_tile, tile, tl.minimum(end, row_end),
        NUM_KV_HEADS, HEAD_DIM, TILE, NUM_TILES,
    )  # fmt: skip
    tl.store(out_ptr + index, tl.load(at, counts, other=-1.0))


@pytest.mark.parametrize("window", [None, 40])
def test_the_first_tiles_of_a_row_are_found(window: int | None) -> None:
    shape = KVShape(40, HEADS, BLOCK_SIZE, HEAD_DIM)
    plan = triton_backend.plan_decode(len(CONTEXTS), 13, [window], shape, torch.float32, DEVICE)
    assert plan.decode is not None
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:13].to(torch.int32)
    plan.decode.block_tables.copy_(torch.stack([tables.roll(turns) for turns in range(len(CONTEXTS))]))
    plan.decode.context_lengths.copy_(torch.tensor(CONTEXTS))
    refresh(plan.decode, BLOCK_SIZE, tile=BLOCK_SIZE)
    kv = torch.arange(40 * 2 * HEADS * BLOCK_SIZE * HEAD_DIM, dtype=torch.float32, device=DEVICE)
    kv = kv.view(40, 2, HEADS, BLOCK_SIZE, HEAD_DIM)
    tile = 0  # on the line of tiles of all rows, in their order
    for sequence, context in enumerate(CONTEXTS):
        first_block = max(0, context - window) // BLOCK_SIZE if window else 0
        blocks = plan.decode.block_tables[sequence, first_block : -(-context // BLOCK_SIZE)].tolist()
        for head in range(HEADS):
            for share in (1, 2, 100):  # tiles that are left to the program
                out = torch.empty(NUM_INDICES, device=DEVICE)
                _read_kernel[(1,)](
                    kv, plan.decode.block_tables, plan.decode.block_tables.stride(0), plan.decode.tile_ends[window],
                    plan.decode.context_lengths, window or 0, sequence, tile, tile + share, out,
                    NUM_KV_HEADS=HEADS, HEAD_DIM=HEAD_DIM, TILE=BLOCK_SIZE, WINDOWED=window is not None,
                    NUM_TILES=NUM_TILES, NUM_INDICES=NUM_INDICES,
                )  # fmt: skip
                wanted = [
                    kv[block, which, head, 0, 0].item() for block in blocks[:NUM_TILES][:share] for which in (0, 1)
                ]
                assert out.tolist() == wanted + [-1.0] * (NUM_INDICES - len(wanted))
            tile += len(blocks)
    assert tile == HEADS * int(plan.decode.tile_ends[window][-1])
