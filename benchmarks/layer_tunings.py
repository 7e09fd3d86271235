"""What `benchmarks.tune_layer` tries for the products of a rank's layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch

from benchmarks.random_model import read_shape
from common.kernels.linear_tuning import Kind, Launch, LinearTuning
from common.models.config import ModelConfig
from common.parallel.sharding import shard_of

DTYPE: Final = torch.bfloat16
MULTIPROCESSORS: Final = 132  # of an H100 or H200
SHARED_BYTES: Final = 225 << 10  # of a multiprocessor, less what the driver and barriers take
MAX_STAGES: Final = 12
SPLITS: Final = (8, 6, 4, 3, 2, 1)
MIN_PART_INPUTS: Final = 512
MIN_BUSY: Final = 0.6  # of the places that the multiprocessors have for programs
PREFETCH_BYTES: Final = 512  # more gained nothing

Key = tuple[int, int, Kind, int]  # of `TUNED`


class Form(NamedTuple):
    """A tuning but for what follows from how many programs share a multiprocessor."""

    block_n: int
    block_k: int
    swap: bool = True
    use_tma: bool = True
    num_warps: int = 4


FORMS: Final[dict[Kind, tuple[Form, ...]]] = {
    Kind.PLAIN: (
        Form(64, 128),
        Form(64, 64),
        Form(64, 128, use_tma=False),
        Form(32, 128, swap=False),
        Form(32, 256, swap=False),
        Form(128, 64),
        Form(128, 128, num_warps=8),
    ),
    Kind.ROTATED: (
        Form(64, 128),
        Form(64, 64),
        Form(32, 128, swap=False),
        Form(32, 64, swap=False),
        Form(32, 256, swap=False),
        Form(16, 128, swap=False),
        Form(16, 256, swap=False),
    ),
    Kind.GATED: (
        Form(64, 128),
        Form(64, 64),
        Form(64, 128, use_tma=False),
        Form(64, 64, use_tma=False),
        Form(128, 64, num_warps=8),
        Form(128, 128, num_warps=8),
    ),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A rank's share of a layer."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ranks: int  # more than one: an all-reduce adds the residual, and products begin with finished rows

    @classmethod
    def of(cls, config: ModelConfig, ranks: int) -> Layer:
        """That of rank 0. Raises `ModelError` if the model cannot be split so."""
        shard = shard_of(config, 0, ranks)
        heads, kv_heads = len(shard.heads), len(shard.kv_heads)
        return cls(config.hidden_size, len(shard.intermediate), heads, kv_heads, config.head_dim, ranks)

    @property
    def products(self) -> dict[str, tuple[int, int, Kind]]:
        """Inputs, outputs and kind, in the order of a layer."""
        attended = self.num_heads * self.head_dim
        return {
            "qkv": (self.hidden, attended + 2 * self.num_kv_heads * self.head_dim, Kind.ROTATED),
            "o": (attended, self.hidden, Kind.PLAIN),
            "gate_up": (self.hidden, 2 * self.intermediate, Kind.GATED),
            "down": (self.intermediate, self.hidden, Kind.PLAIN),
        }

    @property
    def weight_bytes(self) -> int:
        return sum(num_in * num_out * DTYPE.itemsize for num_in, num_out, _ in self.products.values())

    def key(self, product: str, rows: int) -> Key:
        return *self.products[product], rows


class RankShape(NamedTuple):
    """Whose layers are tuned."""

    model: str  # of benchmarks/shapes
    ranks: int
    num_layers: int  # that fit beside the KV of 64 contexts

    def layer(self) -> Layer:
        return Layer.of(read_shape(self.model), self.ranks)


RANK_SHAPES: Final = {
    "8b": RankShape("llama-3.1-8b", 1, 32),
    "8b-tp2": RankShape("llama-3.1-8b", 2, 32),
    "70b-tp2": RankShape("llama-3.1-70b", 2, 20),
}


def candidates(layer: Layer, product: str, rows: int) -> list[LinearTuning]:
    """Every form, with one and with two programs on a multiprocessor. rows: padded.

    Programs all fit on the device at once, as a second wave costs as much as the first, and leave few places empty.
    """
    num_in, num_out, kind = layer.products[product]
    tiles_of_program = 1 if kind == Kind.PLAIN else 2
    found: list[LinearTuning] = []
    for form in FORMS[kind]:
        tiles = -(-num_out // (form.block_n * tiles_of_program))
        step_bytes = (form.block_n * tiles_of_program + rows) * form.block_k * DTYPE.itemsize
        for per_multiprocessor in (1, 2):
            places = MULTIPROCESSORS * per_multiprocessor
            fitting = (n for n in SPLITS if tiles * n <= places and num_in >= n * MIN_PART_INPUTS)
            split = next(fitting, 0)
            stages = min(MAX_STAGES, SHARED_BYTES // per_multiprocessor // step_bytes)
            if tiles * split < MIN_BUSY * places or stages < 2:
                continue
            tuning = LinearTuning(
                form.block_n,
                form.block_k,
                split,
                stages,
                form.num_warps,
                form.swap,
                form.use_tma,
                Launch.AT_END,
                PREFETCH_BYTES,
            )
            found.append(tuning)
    return found


def tuned_line(key: Key, tuning: LinearTuning) -> str:
    """An entry of `TUNED`, with the helpers of `common.kernels.linear_tuning` where they say the same."""
    num_in, num_out, kind, rows = key
    cut = f"{tuning.block_k}, {tuning.split}, {tuning.num_stages}"
    form = replace(tuning, block_k=0, split=0, num_stages=0, use_tma=True)
    common = LinearTuning(64, 0, 0, 0, launch=Launch.AT_END, prefetch_bytes=PREFETCH_BYTES)
    if form == common:
        text = f"_swapped({cut}{'' if tuning.use_tma else ', use_tma=False'})"
    elif form == replace(common, block_n=32, swap=False) and tuning.use_tma and tuning.split == 1:
        text = f"_narrow({tuning.block_k}, {tuning.num_stages})"
    else:
        text = (
            f"LinearTuning({tuning.block_n}, {cut}, {tuning.num_warps}, swap={tuning.swap}, use_tma={tuning.use_tma}, "
            f"launch=Launch.{tuning.launch.name}, prefetch_bytes={tuning.prefetch_bytes})"
        )
    return f"    ({num_in}, {num_out}, Kind.{kind.name}, {rows}): {text},"
