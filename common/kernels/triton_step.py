"""Triton kernel that starts a captured decode step: from what is new in a plan to the inputs of the forward pass.

    packed: [5, n] int32, one column per row of the batch, all from one copy:
            row | context length with this token, 0: padding | new block's column, -1: none | its id | output index

Everything else is on the device already: the rows' block tables and their last tokens.
"""

# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, attr-defined"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

NUM_FIELDS: Final = 5
ROW, LENGTH, NEW_COLUMN, NEW_BLOCK, OUTPUT_INDEX = range(NUM_FIELDS)
_COLUMNS: Final = 1024


def begin_step(
    packed: torch.Tensor,
    row_state: torch.Tensor,
    row_tables: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """Write new blocks to the rows' tables, then fill the batch's inputs.

    packed: [5, n] int32, contiguous; row_state: [rows, fields] int32, the last token first; row_tables: [rows,
    columns] int32, updated. Written: token_ids, positions: [n] int64; lengths: [n] int32; block_tables: [n, columns]
    int32, as far as the context goes.
    """
    num_rows = packed.shape[1]
    _begin_kernel[(num_rows,)](
        packed, row_state, row_tables, token_ids, positions, lengths, block_tables, num_rows, row_state.stride(0),
        row_tables.stride(0), block_tables.stride(0),
        BLOCK_SIZE=block_size, COLUMNS=min(_COLUMNS, triton.next_power_of_2(row_tables.shape[1])), num_warps=4,
    )  # fmt: skip


@triton.jit
def _begin_kernel(
    packed_ptr, state_ptr, row_tables_ptr, token_ids_ptr, positions_ptr, lengths_ptr, tables_ptr, num_rows,
    state_stride, row_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows of the batch,)."""
    index = tl.program_id(0)
    row = tl.load(packed_ptr + index)
    length = tl.load(packed_ptr + num_rows + index)
    new_column = tl.load(packed_ptr + 2 * num_rows + index)
    new_block = tl.load(packed_ptr + 3 * num_rows + index)
    row_table = row_tables_ptr + row.to(tl.int64) * row_stride
    if new_column >= 0:
        tl.store(row_table + new_column, new_block)
    tl.store(token_ids_ptr + index, tl.load(state_ptr + row * state_stride).to(tl.int64))
    tl.store(positions_ptr + index, tl.maximum(length - 1, 0).to(tl.int64))
    tl.store(lengths_ptr + index, length)
    num_blocks = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    table = tables_ptr + index.to(tl.int64) * table_stride
    for start in range(0, num_blocks, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < num_blocks
        block = tl.load(row_table + column, mask, other=0)
        # The store above may not be visible yet.
        tl.store(table + column, tl.where(column == new_column, new_block, block), mask)
