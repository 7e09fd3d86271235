"""What attention needs to know of a ragged batch, as plain numbers. Knows neither models nor devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a batch: `num_queries` consecutive tokens that end its context."""

    num_queries: int
    context_length: int  # tokens that are in the cache once the queries' own K and V are stored
    block_ids: list[int]  # covers the context; may be longer


@dataclass(frozen=True, slots=True)
class KVShape:
    """A rank's KV cache of one layer: [num_blocks, 2, num_kv_heads, block_size, head_dim]."""

    num_blocks: int
    num_kv_heads: int  # on this rank
    block_size: int
    head_dim: int


class BatchPlan:
    """What a backend works out once per step for all layers: indices, masks, tables. Opaque to everybody else."""

    __slots__ = ()
