"""Which part of a model a tensor-parallel rank holds, after Megatron: columns of QKV and gate/up, rows of O and down.

Pure arithmetic over heads, columns and vocabulary rows; knows neither torch nor files.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ModelError
from common.kvcache.layout import heads_of_rank
from common.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part. All ranges are global indices."""

    rank: int
    size: int
    heads: range  # query heads
    kv_heads: range  # replicated where there are fewer KV heads than ranks
    intermediate: range  # columns of gate and up, rows of down; may differ by one between ranks
    vocab: range  # rows of embedding and head; the last ranks may hold fewer
    vocab_stride: int  # rows per rank before the vocabulary ends: what each rank contributes to a gather


def shard_of(config: ModelConfig, rank: int, size: int) -> Shard:
    """Raises `ModelError` if the model cannot be split over `size` ranks."""
    if not 0 <= rank < size:
        raise ModelError(f"rank {rank} is not one of {size} tensor-parallel ranks")
    if config.num_heads % size:
        raise ModelError(f"{config.num_heads} query heads cannot be split over {size} tensor-parallel ranks")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        raise ModelError(f"{config.num_kv_heads} KV heads cannot be split over {size} tensor-parallel ranks")
    num_heads = config.num_heads // size
    stride = -(-config.vocab_size // size)
    return Shard(
        rank=rank,
        size=size,
        heads=range(rank * num_heads, (rank + 1) * num_heads),
        kv_heads=heads_of_rank(config.num_kv_heads, size, rank),
        intermediate=range(rank * config.intermediate_size // size, (rank + 1) * config.intermediate_size // size),
        vocab=range(min(rank * stride, config.vocab_size), min((rank + 1) * stride, config.vocab_size)),
        vocab_stride=stride,
    )
