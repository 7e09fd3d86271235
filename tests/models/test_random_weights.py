"""Random weights have the shapes that a checkpoint's would have, whole or in shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from common.kernels import reference
from common.models.config import read_model_config
from common.models.random_weights import random_weights
from common.models.weights import LayerWeights, Linear, ModelWeights, load_weights
from common.parallel.sharding import shard_of
from tests.models.tiny_checkpoints import write_tiny_checkpoint

CPU = torch.device("cpu")


def shapes(layer: LayerWeights) -> list[object]:
    found: list[object] = []
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, Linear):
            found += [value.weight.shape, None if value.bias is None else value.bias.shape]
        else:
            found.append(None if value is None else value.shape)
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama_tied", "llama_bias"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_shapes_and_size_are_those_of_a_checkpoint(family: str, rank: int, size: int, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(family, tmp_path, seed=1)
    config = read_model_config(path)
    shard = shard_of(config, rank, size)
    loaded = load_weights(path, config, shard, torch.float32, CPU, reference.layout_weight)
    drawn = random_weights(config, shard, torch.float32, CPU, 7, reference.layout_weight)
    assert drawn.num_parameters == loaded.num_parameters
    assert (drawn.embedding.shape, drawn.head.weight.shape) == (loaded.embedding.shape, loaded.head.weight.shape)
    assert [shapes(layer) for layer in drawn.layers] == [shapes(layer) for layer in loaded.layers]


def test_the_seed_decides_the_numbers(tmp_path: Path) -> None:
    config = read_model_config(write_tiny_checkpoint("llama3", tmp_path, seed=1))
    shard = shard_of(config, 0, 1)
    first, again, other = (
        random_weights(config, shard, torch.float32, CPU, seed, reference.layout_weight).layers[2].down.weight
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", ["qwen2", "llama_tied"])
def test_ranks_hold_parts_of_one_model(family: str, tmp_path: Path) -> None:
    config = read_model_config(write_tiny_checkpoint(family, tmp_path, seed=1))

    def drawn(rank: int, size: int) -> ModelWeights:
        shard = shard_of(config, rank, size)
        return random_weights(config, shard, torch.float32, CPU, 5, reference.layout_weight)

    whole, parts = drawn(0, 1), [drawn(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.embedding for part in parts]), whole.embedding)
    for index, layer in enumerate(whole.layers):
        halves = [part.layers[index] for part in parts]
        assert torch.equal(torch.cat([half.down.weight for half in halves]), layer.down.weight)
        assert torch.equal(torch.cat([half.o.weight for half in halves]), layer.o.weight)
        gates = [half.gate_up.weight.chunk(2, dim=1)[0] for half in halves]
        assert torch.equal(torch.cat(gates, dim=1), layer.gate_up.weight.chunk(2, dim=1)[0])
        assert all(torch.equal(half.input_norm, layer.input_norm) for half in halves)


def test_a_part_does_not_keep_the_whole_in_memory(tmp_path: Path) -> None:
    config = read_model_config(write_tiny_checkpoint("llama3", tmp_path, seed=1))
    half = random_weights(config, shard_of(config, 1, 2), torch.float32, CPU, 5, reference.layout_weight)
    assert half.embedding.untyped_storage().nbytes() == half.embedding.nbytes
