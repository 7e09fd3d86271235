"""Triton kernels of attention, rows and blocks behind the signatures of `common.kernels.backend.KernelBackend`.

`cuda_backend` adds products and makes a whole backend of them. Shapes and effects are documented at the reference.
Beyond the reference there are decode plans that stay in place, so that a step can be captured into a CUDA graph, and
digests that stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.kernels import triton_prefill, triton_prefill_hopper, triton_rows
from common.kernels.batch import BatchPlan, KVShape, Span
from common.kernels.triton_blocks import (
    digest_on_device,
    digest_value,
    gather_blocks,
    gather_slot,
    gather_with_digest,
    payload_digest,
    scatter_blocks,
    scatter_slot,
    scatter_with_digest,
)
from common.kernels.triton_decode import (
    DecodeBatch,
    DecodeTuning,
    decode_attention,
    default_tuning,
    refresh,
)
from common.kernels.triton_prefill import PrefillBatch
from common.kernels.triton_rows import add_rms_norm, finished, rms_norm, silu_mul

__all__ = [
    "TritonPlan",
    "add_rms_norm",
    "attention",
    "attention_into",
    "digest_on_device",
    "digest_value",
    "finished",
    "gather_blocks",
    "gather_slot",
    "gather_with_digest",
    "payload_digest",
    "plan_batch",
    "plan_decode",
    "qk_norm_rope_store",
    "refresh_decode",
    "rms_norm",
    "scatter_blocks",
    "scatter_slot",
    "scatter_with_digest",
    "silu_mul",
    "tile_queries",
]


@dataclass(frozen=True, slots=True)
class TritonPlan(BatchPlan):
    """What is the same in every layer of a step. Made by `plan_batch` or `plan_decode`."""

    shape: KVShape
    store_slots: torch.Tensor  # [T] int64: block * block_size + offset; negative: not stored
    prefill: PrefillBatch | None
    decode: DecodeBatch | None
    decode_tuning: DecodeTuning


def plan_batch(
    spans: Sequence[Span],
    windows: Iterable[int | None],
    shape: KVShape,
    dtype: torch.dtype,
    device: torch.device,
) -> TritonPlan:
    """Tables and tiles for a batch whose tokens lie in the order of `spans`. `windows`: those that the model uses."""
    prefill: list[tuple[int, Span]] = []
    decode: list[tuple[int, Span]] = []
    first_row = 0
    for span in spans:
        (decode if span.num_queries == 1 else prefill).append((first_row, span))
        first_row += span.num_queries
    tuning = default_tuning(shape.block_size, shape.head_dim, dtype)
    return TritonPlan(
        shape=shape,
        store_slots=torch.from_numpy(_store_slots(spans, shape.block_size)).to(device),
        prefill=PrefillBatch(tuple(prefill), _block_tables(prefill, shape.block_size, device)) if prefill else None,
        decode=_decode_batch(decode, windows, shape, tuning, device) if decode else None,
        decode_tuning=tuning,
    )


def plan_decode(
    num_sequences: int,
    max_blocks: int,
    windows: Iterable[int | None],
    shape: KVShape,
    dtype: torch.dtype,
    device: torch.device,
) -> TritonPlan:
    """A plan of padding rows, one token each, to capture a graph with.

    Before each replay fill `plan.decode.block_tables` and `.context_lengths` (0: padding); the captured part starts
    with `refresh_decode`.
    """
    decode = DecodeBatch(
        query_rows=torch.arange(num_sequences, dtype=torch.int32, device=device),
        block_tables=torch.zeros((num_sequences, max_blocks), dtype=torch.int32, device=device),
        context_lengths=torch.zeros(num_sequences, dtype=torch.int32, device=device),
        tile_ends=_tile_ends(windows, num_sequences, device),
        store_slots=torch.full((num_sequences,), -1, dtype=torch.int64, device=device),
    )
    plan = TritonPlan(shape, decode.store_slots, None, decode, default_tuning(shape.block_size, shape.head_dim, dtype))
    refresh_decode(plan)
    return plan


def refresh_decode(plan: TritonPlan) -> None:
    """Recompute on the device what follows from the plan's block tables and context lengths. Waits for nothing."""
    assert plan.decode is not None
    refresh(plan.decode, plan.shape.block_size, plan.decode_tuning.tile)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    plan: BatchPlan,
) -> torch.Tensor:
    """As the reference; K and V in `qkv` are left as they were."""
    assert isinstance(plan, TritonPlan)
    slots = plan.store_slots
    return triton_rows.qk_norm_rope_store(qkv, num_heads, cos, sin, q_norm, k_norm, eps, kv_layer, slots)


def attention(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: BatchPlan, window: int | None, scale: float
) -> torch.Tensor:
    """As the reference."""
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty((num_tokens, num_heads * head_dim))
    attention_into(q, kv_layer, plan, window, scale, out)
    return out


def attention_into(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: BatchPlan, window: int | None, scale: float, out: torch.Tensor
) -> None:
    """`attention` into `out`, [T, num_heads * head_dim]."""
    assert isinstance(plan, TritonPlan)
    if plan.prefill is not None:
        kernel = triton_prefill_hopper if triton_prefill_hopper.supports(q, kv_layer) else triton_prefill
        kernel.prefill_attention(q, kv_layer, plan.prefill, window, scale, out)
    if plan.decode is not None:
        decode_attention(q, kv_layer, plan.decode, window, scale, out, plan.decode_tuning)


def tile_queries(num_heads: int, kv_layer: torch.Tensor) -> int:
    """Queries in a tile of prefill attention over such a layer, `num_heads` heads of the layer's dtype."""
    q = kv_layer.new_empty((1, num_heads, kv_layer.shape[-1]))
    kernel = triton_prefill_hopper if triton_prefill_hopper.supports(q, kv_layer) else triton_prefill
    queries: int = kernel.tile_queries(num_heads, kv_layer)
    return queries


def _decode_batch(
    spans: Sequence[tuple[int, Span]],
    windows: Iterable[int | None],
    shape: KVShape,
    tuning: DecodeTuning,
    device: torch.device,
) -> DecodeBatch:
    rows = torch.tensor([row for row, _ in spans], dtype=torch.int32, device=device)
    lengths = torch.tensor([span.context_length for _, span in spans], dtype=torch.int32, device=device)
    batch = DecodeBatch(
        query_rows=rows,
        block_tables=_block_tables(spans, shape.block_size, device),
        context_lengths=lengths,
        tile_ends=_tile_ends(windows, len(spans), device),
        store_slots=torch.empty(len(spans), dtype=torch.int64, device=device),
    )
    refresh(batch, shape.block_size, tuning.tile)
    return batch


def _tile_ends(
    windows: Iterable[int | None], num_sequences: int, device: torch.device
) -> dict[int | None, torch.Tensor]:
    return {window: torch.zeros(num_sequences, dtype=torch.int32, device=device) for window in {None, *windows}}


def _block_tables(spans: Sequence[tuple[int, Span]], block_size: int, device: torch.device) -> torch.Tensor:
    """[n, max blocks] int32, one spare column so that the last tile may read past the context."""
    counts = [-(-span.context_length // block_size) for _, span in spans]
    table = np.zeros((len(spans), -(-max(counts) // 8) * 8 + 8), dtype=np.int32)
    for row, count, (_, span) in zip(table, counts, spans, strict=True):
        row[:count] = span.block_ids[:count]
    return torch.from_numpy(table).to(device)


def _store_slots(spans: Sequence[Span], block_size: int) -> npt.NDArray[np.int64]:
    """[T] int64."""
    parts = []
    for span in spans:
        positions = np.arange(span.context_length - span.num_queries, span.context_length)
        blocks = np.asarray(span.block_ids, dtype=np.int64)[positions // block_size]
        parts.append(blocks * block_size + positions % block_size)
    return np.concatenate(parts)
