"""Attention over KV blocks in plain torch: the CPU's backend, and what other backends are compared with.

Sequences with one query (decode) are taken several at a time: their K and V are gathered into one buffer small enough
for the cache, the queries that share a KV head become rows of one matrix, and padding is masked. Longer runs (prefill
chunks, with or without a cached prefix) are taken one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from common.kernels.batch import BatchPlan, KVShape, Span

_PIECE_ELEMENTS: Final = 1 << 19  # of gathered K and V: 2 MiB in float32, about a core's share of the cache


@dataclass(frozen=True, slots=True)
class _DecodePiece:
    """Sequences with one query each."""

    first_token: int
    num_sequences: int
    num_gathered: int  # tokens gathered per sequence: the most blocks of any of them
    gather_index: torch.Tensor  # [2 * num_sequences * num_kv_heads * blocks] int64 into rows of one head's block
    mask: torch.Tensor  # [num_sequences, 1, 1, num_gathered], 0 or -inf


@dataclass(frozen=True, slots=True)
class _PrefillPiece:
    """One sequence with several queries."""

    first_token: int
    num_queries: int
    num_gathered: int  # tokens, a multiple of the block size
    num_visible: int  # of them, up to the end of the context
    gather_index: torch.Tensor  # [2 * num_kv_heads * blocks] int64
    mask: torch.Tensor | None  # [num_queries, num_visible], 0 or -inf; None: causal from the first token


@dataclass(frozen=True, slots=True)
class ReferencePlan(BatchPlan):
    """What is the same in every layer of a step. Made by `plan_batch`, read by this backend only."""

    store_index: torch.Tensor  # [T * 2 * num_kv_heads] int64 into rows of head_dim elements
    cleaned: torch.Tensor  # [T] bool: K or V of the token was not finite in some layer, see `spoil_cleaned`
    pieces: dict[int | None, list[_DecodePiece | _PrefillPiece]]  # by window


def plan_batch(
    spans: Sequence[Span],
    windows: Iterable[int | None],
    shape: KVShape,
    dtype: torch.dtype,
    device: torch.device,
) -> ReferencePlan:
    """Indices and masks for a batch whose tokens lie in the order of `spans`.

    Neighbouring decode spans of similar context length waste least. `windows`: those that the model's layers use.
    """
    planner = _Planner(spans, shape, dtype, device)
    return ReferencePlan(
        store_index=planner.store_index(),
        cleaned=torch.zeros(sum(span.num_queries for span in spans), dtype=torch.bool, device=device),
        pieces={window: planner.pieces(window) for window in windows},
    )


def attention(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: BatchPlan, window: int | None, scale: float
) -> torch.Tensor:
    """Causal attention of every query over its sequence's cached tokens, its own included.

    q: [T, num_heads, head_dim]; kv_layer: [num_blocks, 2, num_kv_heads, block_size, head_dim].
    Returns [T, num_heads * head_dim]. Tokens outside a context are masked but read: blocks hold only finite numbers.
    """
    assert isinstance(plan, ReferencePlan)
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    rows = kv_layer.view(-1, block_size * head_dim)
    group = num_heads // num_kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format).view(num_tokens, num_kv_heads, group, head_dim)
    grouped = q.view(num_tokens, num_kv_heads, group, head_dim)
    for piece in plan.pieces[window]:
        if isinstance(piece, _DecodePiece):
            _decode(grouped, rows, piece, scale, out)
        else:
            _prefill(grouped, rows, piece, scale, out)
    return out.view(num_tokens, num_heads * head_dim)


def _decode(q: torch.Tensor, rows: torch.Tensor, piece: _DecodePiece, scale: float, out: torch.Tensor) -> None:
    """q, out: [T, num_kv_heads, group, head_dim]; rows: [num_blocks * 2 * num_kv_heads, block_size * head_dim]."""
    _, num_kv_heads, group, head_dim = q.shape
    own = slice(piece.first_token, piece.first_token + piece.num_sequences)
    keys, values = (
        rows.index_select(0, piece.gather_index)
        .view(2, piece.num_sequences, num_kv_heads, piece.num_gathered, head_dim)
        .unbind()
    )
    mask = piece.mask.expand(-1, num_kv_heads, group, -1)
    out[own] = functional.scaled_dot_product_attention(q[own], keys, values, attn_mask=mask, scale=scale)


def _prefill(q: torch.Tensor, rows: torch.Tensor, piece: _PrefillPiece, scale: float, out: torch.Tensor) -> None:
    """As `_decode`. KV heads are the batch and a head's queries its heads, so that K and V are shared by stride."""
    _, num_kv_heads, group, head_dim = q.shape
    own = slice(piece.first_token, piece.first_token + piece.num_queries)
    gathered = rows.index_select(0, piece.gather_index).view(2, num_kv_heads, 1, piece.num_gathered, head_dim)
    keys, values = gathered[:, :, :, : piece.num_visible].expand(-1, -1, group, -1, -1).unbind()
    attended = functional.scaled_dot_product_attention(
        q[own].permute(1, 2, 0, 3), keys, values, piece.mask, is_causal=piece.mask is None, scale=scale
    )
    out[own] = attended.permute(2, 0, 1, 3)


class _Planner:
    """Builds a `ReferencePlan`."""

    def __init__(self, spans: Sequence[Span], shape: KVShape, dtype: torch.dtype, device: torch.device) -> None:
        self._spans = spans
        self._shape = shape
        self._dtype = dtype
        self._device = device
        # Rows of one head's block: K of every head, then V of every head.
        self._head_rows = torch.arange(2 * shape.num_kv_heads, device=device)

    def store_index(self) -> torch.Tensor:
        """Where each token's K and V heads go."""
        size = self._shape.block_size
        head_slots = 2 * self._shape.num_kv_heads * size
        first_rows = [
            span.block_ids[position // size] * head_slots + position % size
            for span in self._spans
            for position in range(span.context_length - span.num_queries, span.context_length)
        ]
        starts = torch.tensor(first_rows, dtype=torch.int64, device=self._device)
        return (starts.unsqueeze(1) + self._head_rows * size).flatten()

    def pieces(self, window: int | None) -> list[_DecodePiece | _PrefillPiece]:
        """Cut the batch: runs of decode spans up to `_PIECE_ELEMENTS`, and each prefill span for itself."""
        pieces: list[_DecodePiece | _PrefillPiece] = []
        run: list[Span] = []
        run_blocks = first_token = 0
        for span in self._spans:
            blocks = self._last_block(span) - self._first_block(span, window)
            fits = (len(run) + 1) * max(run_blocks, blocks) * self._block_elements <= _PIECE_ELEMENTS
            if run and not (span.num_queries == 1 and fits):
                pieces.append(self._decode_piece(run, first_token, window))
                first_token += len(run)
                run, run_blocks = [], 0
            if span.num_queries == 1:
                run.append(span)
                run_blocks = max(run_blocks, blocks)
            else:
                pieces.append(self._prefill_piece(span, first_token, window))
                first_token += span.num_queries
        if run:
            pieces.append(self._decode_piece(run, first_token, window))
        return pieces

    @property
    def _block_elements(self) -> int:
        return 2 * self._shape.num_kv_heads * self._shape.block_size * self._shape.head_dim

    def _first_block(self, span: Span, window: int | None) -> int:
        """The first block that the span's first query sees."""
        if window is None:
            return 0
        return max(0, span.context_length - span.num_queries + 1 - window) // self._shape.block_size

    def _last_block(self, span: Span) -> int:
        return -(-span.context_length // self._shape.block_size)

    def _decode_piece(self, spans: list[Span], first_token: int, window: int | None) -> _DecodePiece:
        firsts = [self._first_block(span, window) for span in spans]
        tables = [span.block_ids[first : self._last_block(span)] for span, first in zip(spans, firsts, strict=True)]
        num_blocks = max(map(len, tables))
        padded = [table + [0] * (num_blocks - len(table)) for table in tables]
        num_gathered = num_blocks * self._shape.block_size
        starts = torch.tensor(firsts, device=self._device) * self._shape.block_size
        ends = torch.tensor([span.context_length for span in spans], device=self._device)
        keys = torch.arange(num_gathered, device=self._device)
        hidden = keys >= (ends - starts).unsqueeze(1)
        if window is not None:
            hidden |= keys < (ends - starts - window).unsqueeze(1)
        return _DecodePiece(
            first_token=first_token,
            num_sequences=len(spans),
            num_gathered=num_gathered,
            gather_index=self._gather_index(padded),
            mask=self._additive(hidden).view(len(spans), 1, 1, num_gathered),
        )

    def _prefill_piece(self, span: Span, first_token: int, window: int | None) -> _PrefillPiece:
        first = self._first_block(span, window)
        table = span.block_ids[first : self._last_block(span)]
        start = first * self._shape.block_size
        num_visible = span.context_length - start
        needs_mask = span.num_queries < span.context_length or (window is not None and window < span.context_length)
        return _PrefillPiece(
            first_token=first_token,
            num_queries=span.num_queries,
            num_gathered=len(table) * self._shape.block_size,
            num_visible=num_visible,
            gather_index=self._gather_index([table]),
            mask=self._prefill_mask(span.num_queries, num_visible, window) if needs_mask else None,
        )

    def _prefill_mask(self, num_queries: int, num_visible: int, window: int | None) -> torch.Tensor:
        """[num_queries, num_visible]; the last query sits at the last visible token."""
        keys = torch.arange(num_visible, device=self._device)
        queries = keys[num_visible - num_queries :].unsqueeze(1)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return self._additive(hidden)

    def _gather_index(self, tables: list[list[int]]) -> torch.Tensor:
        """[2 * len(tables) * num_kv_heads * blocks]: K of every sequence and head, then V."""
        block_rows = torch.tensor(tables, dtype=torch.int64, device=self._device) * len(self._head_rows)
        head_rows = self._head_rows.view(2, 1, -1, 1)
        return (block_rows.unsqueeze(1) + head_rows).flatten()

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        """bool → 0 where visible, -inf where hidden."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))
