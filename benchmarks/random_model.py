"""A rank's share of a model with random weights, its KV blocks, and step plans as a front would send them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from common.kernels.backend import KernelBackend, kernels_for
from common.kvcache.storage import KVStorage
from common.models.config import ModelConfig, parse_model_config
from common.models.decoder import Decoder
from common.models.random_weights import random_weights
from common.parallel.group import TensorParallelGroup
from common.parallel.sharding import shard_of
from common.sampling.params import SamplingParams
from common.worker.model_runner import Runner
from common.worker.step_plan import AddRow, Segment, pack_tokens

BLOCK_SIZE = 64
SHAPES = Path(__file__).parent / "shapes"
GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)


def read_shape(name: str, num_layers: int | None = None) -> ModelConfig:
    """A shape of `benchmarks/shapes`, perhaps with fewer layers."""
    config = parse_model_config(json.loads((SHAPES / f"{name}.json").read_bytes()))
    if num_layers is None:
        return config
    return dataclasses.replace(config, num_layers=num_layers, windows=config.windows[:num_layers])


def random_decoder(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    kernels: KernelBackend | None = None,
    seed: int = 0,
    group: TensorParallelGroup | None = None,
) -> Decoder:
    """`kernels`: another backend than the device's own. `group`: the ranks that share the model, else it has one."""
    kernels = kernels or kernels_for(device)
    group = group or TensorParallelGroup.single()
    shard = shard_of(config, group.rank, group.size)
    weights = random_weights(config, shard, dtype, device, seed, kernels.layout_weight)
    return Decoder(config, shard, weights, kernels, group)


def random_storage(decoder: Decoder, num_blocks: int) -> KVStorage:
    """Blocks of the rank's KV heads full of noise, as those of long contexts are."""
    config, num_kv_heads = decoder.config, len(decoder.shard.kv_heads)
    storage = KVStorage(
        config.num_layers, num_blocks, num_kv_heads, BLOCK_SIZE, config.head_dim, decoder.dtype, decoder.device
    )
    for layer in storage.kv:
        layer.normal_()
    return storage


class Front:
    """What a front keeps: free blocks, and each row's table and length. The same calls make the same plans."""

    def __init__(self, runner: Runner, num_blocks: int) -> None:
        self.runner = runner
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(num_blocks)).tolist()
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._outputs: dict[int, int] = {}

    def add(self, row: int, length: int, last_token: int | None = None, sampling: SamplingParams = GREEDY) -> None:
        """A sequence of which `length` tokens are said to be in blocks already."""
        self.runner.add_row(
            AddRow(row, sampling, pack_tokens([1]), pack_tokens([] if last_token is None else [last_token]))
        )
        self._tables[row], self._lengths[row], self._outputs[row] = [], length, 0 if last_token is None else 1

    def remove(self, row: int) -> None:
        self.runner.remove_row(row)
        self._free += self._tables.pop(row)

    def segment(self, row: int, token_ids: list[int] | None = None, sample: bool = True) -> Segment:
        """The row's next tokens: those given, or the one sampled last."""
        position = self._lengths[row]
        self._lengths[row] += 1 if token_ids is None else len(token_ids)
        table = self._tables[row]
        new: list[int] = []
        while (len(table) + len(new)) * BLOCK_SIZE < self._lengths[row]:
            new.append(self._free.pop())
        table += new
        packed = None if token_ids is None else pack_tokens(token_ids)
        segment = Segment(row, packed, position, new, sample, self._outputs[row])
        self._outputs[row] += int(sample)
        return segment
