"""The kernel backend of GPUs: Triton kernels and cuBLAS, with plans whose tables go up without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.kernels.batch import BatchPlan, KVShape, Span
from common.kernels.linear_tuning import Kind
from common.kernels.scaled_rows import NormedRows, values_of
from common.kernels.triton_backend import (
    TritonPlan,
    add_rms_norm,
    attention,
    finished,
    gather_blocks,
    gather_slot,
    payload_digest,
    plan_decode,
    qk_norm_rope_store,
    refresh_decode,
    rms_norm,
    scatter_blocks,
    scatter_slot,
    silu_mul,
    spoil_cleaned,
    tile_queries,
)
from common.kernels.triton_decode import DecodeBatch, default_tuning, refresh
from common.kernels.triton_linear import (
    gate_up_silu_few,
    is_ahead,
    linear_add_scale_few,
    linear_few,
    qkv_rope_store_few,
)
from common.kernels.triton_prefill import PrefillBatch
from common.kernels.upload import upload

__all__ = [
    "TritonPlan",
    "add_rms_norm",
    "attention",
    "gate_up_silu",
    "gather_blocks",
    "gather_slot",
    "layout_weight",
    "linear",
    "linear_add_norm",
    "payload_digest",
    "plan_batch",
    "plan_decode",
    "plan_mixed",
    "qk_norm_rope_store",
    "qkv_rope_store",
    "refresh_decode",
    "rms_norm",
    "scatter_blocks",
    "scatter_slot",
    "spoil_cleaned",
    "tile_queries",
]

_HEAD = 16  # outputs to inputs of the head, at least; products of a layer have fewer
_SPARE_COLUMNS = 8  # of block tables: the last tile may read past the context
_Spans = list[tuple[int, Span]]  # with the row of their first query in the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _TiledBatch(PrefillBatch):
    """Chunks whose tiles are written before each replay of a captured graph."""

    fixed_tiles: torch.Tensor
    queries: int

    def tiles(self, queries: int) -> torch.Tensor:
        assert queries == self.queries, "the tiles were made for another kernel"
        return self.fixed_tiles


def layout_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] → [in, out]; in memory as it is fastest for few rows, with little difference for many.

    cuBLAS reads the head 15 % faster where that lies [in, out]; all else lies [out, in], as our own products want it
    (`benchmarks/linears`, `benchmarks/tune_layer`).
    """
    num_out, num_in = weight.shape
    return weight.t().contiguous() if num_out >= _HEAD * num_in else weight.contiguous().t()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: [T, in]; weight: [in, out], of either stride; bias: [out]. Returns [T, out]."""
    if bias is not None:
        return torch.addmm(bias, x, weight)
    return linear_few(x, weight) if is_ahead(x, weight, Kind.PLAIN) else torch.mm(x, weight)


def linear_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> NormedRows:
    """As the reference."""
    if bias is None and is_ahead(x, weight, Kind.PLAIN):
        return linear_add_scale_few(x, weight, residual, norm, eps)
    return add_rms_norm(linear(x, weight, bias), residual, norm, eps)


def gate_up_silu(x: NormedRows, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: [T, in]; weight: [in, 2n], gate first; bias: [2n]. Returns silu(gate) * up, [T, n]."""
    if bias is None and is_ahead(values_of(x), weight, Kind.GATED):
        return gate_up_silu_few(x, weight)
    return silu_mul(linear(finished(x), weight, bias))


def qkv_rope_store(
    x: NormedRows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    plan: BatchPlan,
) -> torch.Tensor:
    """As the reference."""
    if bias is None and q_norm is None and is_ahead(values_of(x), weight, Kind.ROTATED):
        assert isinstance(plan, TritonPlan)
        return qkv_rope_store_few(x, weight, num_heads, cos, sin, kv_layer, plan.store_slots, plan.cleaned)
    qkv = linear(finished(x), weight, bias).view(-1, weight.shape[1] // kv_layer.shape[-1], kv_layer.shape[-1])
    return qk_norm_rope_store(qkv, num_heads, cos, sin, q_norm, k_norm, eps, kv_layer, plan)


def plan_batch(
    spans: Sequence[Span],
    windows: Iterable[int | None],
    shape: KVShape,
    dtype: torch.dtype,
    device: torch.device,
) -> TritonPlan:
    """Tables for a batch whose tokens lie in the order of `spans`, in one copy. `windows`: those of the model."""
    prefill: _Spans = []
    decode: _Spans = []
    first_row = 0
    for span in spans:
        (decode if span.num_queries == 1 else prefill).append((first_row, span))
        first_row += span.num_queries
    slots, cleaned, prefill_tables, decode_tables, rows, lengths = upload(
        [
            _store_slots(spans, shape.block_size),
            np.zeros(first_row, dtype=np.int32),
            _block_tables(prefill, shape.block_size),
            _block_tables(decode, shape.block_size),
            np.array([row for row, _ in decode], dtype=np.int32),
            np.array([span.context_length for _, span in decode], dtype=np.int32),
        ],
        device,
    )
    tuning = default_tuning(shape.block_size, shape.head_dim, dtype)
    batch = None
    if decode:
        tile_ends = {window: torch.empty_like(lengths) for window in {None, *windows}}
        batch = DecodeBatch(rows, decode_tables, lengths, tile_ends, torch.empty_like(lengths, dtype=torch.int64))
        refresh(batch, shape.block_size, tuning.tile)
    return TritonPlan(
        shape=shape,
        store_slots=slots,
        cleaned=cleaned,
        prefill=PrefillBatch(tuple(prefill), prefill_tables) if prefill else None,
        decode=batch,
        decode_tuning=tuning,
    )


def plan_mixed(
    block_tables: torch.Tensor,
    chunk_tables: torch.Tensor,
    tiles: torch.Tensor,
    queries: int,
    num_tokens: int,
    windows: Iterable[int | None],
    shape: KVShape,
    dtype: torch.dtype,
) -> TritonPlan:
    """A plan of padding to capture a graph with: rows that decode, then `num_tokens` tokens of chunks of prompts.

    block_tables, chunk_tables: [rows or chunks, columns] int32, of `table_columns`, all entries naming some block;
    tiles: [n, 4] int32, see `PrefillBatch`, of up to `queries` queries each (`tile_queries`). Before each replay fill
    these and `decode.context_lengths` (0: padding), and `store_slots` of the chunks' tokens, which come last; the
    captured part starts with `refresh_decode`, unless there are no rows.
    """
    device, num_rows = block_tables.device, block_tables.shape[0]
    slots = torch.full((num_rows + num_tokens,), -1, dtype=torch.int64, device=device)
    decode = None
    if num_rows:
        lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)
        decode = DecodeBatch(
            query_rows=torch.arange(num_rows, dtype=torch.int32, device=device),
            block_tables=block_tables,
            context_lengths=lengths,
            tile_ends={window: torch.zeros_like(lengths) for window in {None, *windows}},
            store_slots=slots[:num_rows],
        )
    plan = TritonPlan(
        shape=shape,
        store_slots=slots,
        cleaned=torch.zeros_like(slots, dtype=torch.int32),
        prefill=_TiledBatch((), chunk_tables, fixed_tiles=tiles, queries=queries),
        decode=decode,
        decode_tuning=default_tuning(shape.block_size, shape.head_dim, dtype),
    )
    if decode is not None:
        refresh_decode(plan)
    return plan


def table_columns(num_blocks: int) -> int:
    """Columns of a block table for contexts of so many blocks."""
    return -(-num_blocks // _SPARE_COLUMNS) * _SPARE_COLUMNS + _SPARE_COLUMNS


def _block_tables(spans: _Spans, block_size: int) -> npt.NDArray[np.int32]:
    """[n, columns]"""
    counts = [-(-span.context_length // block_size) for _, span in spans]
    tables = np.zeros((len(spans), table_columns(max(counts, default=0))), dtype=np.int32)
    for table, count, (_, span) in zip(tables, counts, spans, strict=True):
        table[:count] = span.block_ids[:count]
    return tables


def _store_slots(spans: Sequence[Span], block_size: int) -> npt.NDArray[np.int64]:
    """[T]: where each token's K and V go, block * block_size + offset."""
    parts: list[npt.NDArray[np.int64]] = []
    for span in spans:
        begin, end = span.context_length - span.num_queries, span.context_length
        first = begin // block_size
        blocks = np.array(span.block_ids[first : -(-end // block_size)], dtype=np.int64)
        slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
        parts.append(slots[begin - first * block_size : end - first * block_size])
    return np.concatenate(parts)
