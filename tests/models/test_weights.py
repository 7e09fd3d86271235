"""Loading shards: together they hold every tensor once, and what does not fit is named."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.models.config import ModelConfig, read_model_config
from common.models.weights import ModelWeights, load_weights
from common.parallel.sharding import shard_of
from tests.models.tiny_checkpoints import write_tiny_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint("llama_bias", tmp_path, seed=4)


def load(path: Path, config: ModelConfig, rank: int = 0, size: int = 1) -> ModelWeights:
    shard = shard_of(config, rank, size)
    return load_weights(path, config, shard, torch.float32, torch.device("cpu"), torch.t)


def test_shards_side_by_side_are_the_whole(checkpoint: Path) -> None:
    config = read_model_config(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    parts = [load(checkpoint, config, rank, size=2) for rank in range(2)]
    layers = [part.layers[1] for part in parts]
    prefix = "model.layers.1."
    q = torch.cat([layer.qkv.weight.t()[: 2 * 16] for layer in layers])
    v = torch.cat([layer.qkv.weight.t()[-16:] for layer in layers])
    up = torch.cat([layer.gate_up.weight.t()[88:] for layer in layers])
    down = torch.cat([layer.down.weight.t() for layer in layers], dim=1)
    assert torch.equal(q, stored[prefix + "self_attn.q_proj.weight"])
    assert torch.equal(v, stored[prefix + "self_attn.v_proj.weight"])
    assert torch.equal(up, stored[prefix + "mlp.up_proj.weight"])
    assert torch.equal(down, stored[prefix + "mlp.down_proj.weight"])
    assert torch.equal(torch.cat([part.embedding for part in parts]), stored["model.embed_tokens.weight"])


def test_a_summed_bias_is_on_the_first_rank_only(checkpoint: Path) -> None:
    config = read_model_config(checkpoint)
    first, second = (load(checkpoint, config, rank, size=2).layers[0] for rank in range(2))
    assert first.o.bias is not None
    assert first.down.bias is not None
    assert second.o.bias is None
    assert second.down.bias is None
    assert second.qkv.bias is not None


def test_a_vocabulary_that_does_not_divide_is_padded_at_its_end(checkpoint: Path) -> None:
    config = read_model_config(checkpoint)
    last = load(checkpoint, config, rank=2, size=4)
    assert last.head.weight.shape == (64, 80)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:317].contiguous()
    save_file(tensors, path)
    last = load(checkpoint, replace(config, vocab_size=317), rank=3, size=4)
    assert last.embedding.shape == (77, 64)
    assert last.head.weight.shape == (64, 80)
    assert not last.head.weight[:, 77:].any()


def test_parameters_are_counted(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    config = read_model_config(checkpoint)
    assert load(checkpoint, config).num_parameters == sum(tensor.numel() for tensor in stored.values())


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    config = read_model_config(checkpoint)
    with pytest.raises(ModelError, match=r"model\.layers\.3\.input_layernorm\.weight is missing"):
        load(checkpoint, replace(config, num_layers=4, windows=(None,) * 4))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight is missing"):
        load(checkpoint, replace(config, qk_norm=True))


def test_a_wrong_shape_is_named(checkpoint: Path) -> None:
    config = read_model_config(checkpoint)
    with pytest.raises(ModelError, match=r"gate_proj\.weight has shape \[176, 64\], expected \[180, 64\]"):
        load(checkpoint, replace(config, intermediate_size=180))


def test_an_unreadable_dtype_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has dtype I8"):
        load(checkpoint, read_model_config(checkpoint))


def test_a_file_that_contradicts_itself_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    (num_bytes,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + num_bytes].replace(b'"shape":[320,64]', b'"shape":[320,65]')
    path.write_bytes(content[:8] + header + content[8 + num_bytes :])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: .*shape"):
        load(checkpoint, read_model_config(checkpoint))
