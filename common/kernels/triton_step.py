"""Triton kernels that start a captured step, from what is new in a plan to the inputs of the forward pass, and one that
looks at chunks when it is over.

    packed: [5, n] int32, one column per row that decodes, all from one copy:
            row | context length with this token, 0: padding | new block's column, -1: none | its id | output index
    chunks: [4, n] int32, one column per chunk of a prompt, from one copy with the chunks' token ids:
            row | number of tokens, 0: padding | place of the first among the chunks' tokens | its position

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
NUM_CHUNK_FIELDS: Final = 4
CHUNK_ROW, CHUNK_LENGTH, CHUNK_PLACE, CHUNK_POSITION = range(NUM_CHUNK_FIELDS)
_COLUMNS: Final = 1024
_TOKENS: Final = 64  # of a program
_JUDGED_TOKENS: Final = 1024  # at a time


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


def begin_chunks(
    chunks: torch.Tensor,
    chunk_token_ids: torch.Tensor,
    row_tables: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    store_slots: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """Fill the inputs of chunks, whose new blocks are in the rows' tables already.

    chunks: [4, n] int32, contiguous; chunk_token_ids: [T] int32, one chunk after the other; row_tables: [rows,
    columns] int32. Written: token_ids, positions, store_slots: [T] int64, 0, 0 and -1 for tokens beyond the chunks;
    block_tables: [n, columns] int32, as far as the contexts go.
    """
    num_chunks, num_tokens = chunks.shape[1], chunk_token_ids.shape[0]
    _begin_chunks_kernel[(num_chunks + triton.cdiv(num_tokens, _TOKENS),)](
        chunks, chunk_token_ids, row_tables, token_ids, positions, store_slots, block_tables, num_tokens,
        row_tables.stride(0), block_tables.stride(0),
        NUM_CHUNKS=num_chunks, BLOCK_SIZE=block_size, TOKENS=_TOKENS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(row_tables.shape[1])), num_warps=4,
    )  # fmt: skip


def judge_chunks(hidden: torch.Tensor, places: torch.Tensor, lengths: torch.Tensor, is_bad: torch.Tensor) -> None:
    """Whether a token of a chunk has a hidden state that is not finite: its first number tells (`Decoder.forward`).

    hidden: [T, hidden], rows contiguous; places, lengths: [n] int32, first token and number of tokens of each chunk.
    Written: is_bad: [n] int32, 1 or 0.
    """
    _judge_kernel[(places.shape[0],)](
        hidden, places, lengths, is_bad, hidden.stride(0), TOKENS=_JUDGED_TOKENS, num_warps=4
    )


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


@triton.jit
def _begin_chunks_kernel(
    chunks_ptr, chunk_token_ids_ptr, row_tables_ptr, token_ids_ptr, positions_ptr, slots_ptr, tables_ptr, num_tokens,
    row_stride, table_stride,
    NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks + parts of the tokens,)."""
    program = tl.program_id(0)
    if program < NUM_CHUNKS:
        row_table = row_tables_ptr + tl.load(chunks_ptr + program).to(tl.int64) * row_stride
        length = tl.load(chunks_ptr + NUM_CHUNKS + program)
        context_length = tl.where(length > 0, tl.load(chunks_ptr + 3 * NUM_CHUNKS + program) + length, 0)
        num_blocks = (context_length + BLOCK_SIZE - 1) // BLOCK_SIZE
        for start in range(0, num_blocks, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = column < num_blocks
            block = tl.load(row_table + column, mask, other=0)
            tl.store(tables_ptr + program * table_stride + column, block, mask)
    else:
        token = (program - NUM_CHUNKS) * TOKENS + tl.arange(0, TOKENS)
        inside = token < num_tokens
        row = tl.zeros([TOKENS], tl.int64)
        position = tl.zeros([TOKENS], tl.int32)
        held = tl.zeros([TOKENS], tl.int32)
        for chunk in tl.static_range(NUM_CHUNKS):
            place = token - tl.load(chunks_ptr + 2 * NUM_CHUNKS + chunk)
            own = (place >= 0) & (place < tl.load(chunks_ptr + NUM_CHUNKS + chunk)) & inside
            row = tl.where(own, tl.load(chunks_ptr + chunk).to(tl.int64), row)
            position = tl.where(own, tl.load(chunks_ptr + 3 * NUM_CHUNKS + chunk) + place, position)
            held |= own.to(tl.int32)
        is_held = held != 0
        token_id = tl.load(chunk_token_ids_ptr + token, is_held, other=0)
        block = tl.load(row_tables_ptr + row * row_stride + position // BLOCK_SIZE, is_held, other=0)
        slot = tl.where(is_held, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        tl.store(token_ids_ptr + token, token_id.to(tl.int64), inside)
        tl.store(positions_ptr + token, position.to(tl.int64), inside)
        tl.store(slots_ptr + token, slot, inside)


@triton.jit(do_not_specialize_on_alignment=["places_ptr", "lengths_ptr", "is_bad_ptr"])
def _judge_kernel(hidden_ptr, places_ptr, lengths_ptr, is_bad_ptr, stride, TOKENS: tl.constexpr):
    """Grid: (chunks,)."""
    chunk = tl.program_id(0)
    length = tl.load(lengths_ptr + chunk)
    own = hidden_ptr + tl.load(places_ptr + chunk).to(tl.int64) * stride
    is_bad = tl.zeros([TOKENS], tl.int32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        first = tl.load(own + token.to(tl.int64) * stride, token < length, other=0.0).to(tl.float32)
        is_bad |= (tl.abs(first) < float("inf")).to(tl.int32) ^ 1
    tl.store(is_bad_ptr + chunk, tl.max(is_bad, 0))
