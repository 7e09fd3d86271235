"""What a front reads of a model: it refuses what its ranks could not serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from common.errors import InvalidArgument, ModelError
from common.kernels.head_sizes import CUDA_HEAD_DIMS
from common.models.config import parse_model_config, read_model_config
from common.models.tensor_shapes import tensor_shapes
from common.worker.worker_model import read_worker_model, resolve_dtype

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shapes = tensor_shapes(parse_model_config(CONFIG))
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_checkpoint_that_is_cut_short_is_refused_before_any_rank_starts(model_dir: Path) -> None:
    assert read_worker_model(model_dir, "cpu", "auto", 64, 1).dtype == "float32"
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors .*2300 bytes of tensors, its header describes 2400"):
        read_worker_model(model_dir, "cpu", "auto", 64, 1)


@pytest.mark.parametrize("head_dim", [8, 80, 96, 100, 112, 120, 256])
def test_heads_that_kernels_of_gpus_do_not_take_are_refused_in_one_line(model_dir: Path, head_dim: int) -> None:
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"head_dim": head_dim}))
    assert read_worker_model(model_dir, "cpu", "auto", 64, 1, random_weights=True).config.head_dim == head_dim
    with pytest.raises(ModelError) as refusal:
        read_worker_model(model_dir, "cuda", "auto", 64, 1)
    assert str(refusal.value) == (
        f"config.json: head_dim = {head_dim} is not served on cuda, only {', '.join(map(str, CUDA_HEAD_DIMS))}"
    )


@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_heads_that_kernels_of_gpus_take_are_served(model_dir: Path, head_dim: int) -> None:
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"head_dim": head_dim}))
    assert read_worker_model(model_dir, "cuda", "auto", 64, 1, random_weights=True).config.head_dim == head_dim


def test_weights_that_are_not_the_configuration_s_are_refused_before_any_rank_starts(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"attention_bias": True}))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is missing"):
        read_worker_model(model_dir, "cpu", "auto", 64, 1)
    assert read_worker_model(model_dir, "cpu", "auto", 64, 1, random_weights=True).config.qkv_bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_ranks_compute_in_is_taken_as_it_is(model_dir: Path, dtype: str) -> None:
    assert read_worker_model(model_dir, "cpu", dtype, 64, 1).dtype == dtype


def test_the_dtype_of_the_checkpoint_is_not_taken_on_a_cpu(model_dir: Path) -> None:
    config = read_model_config(model_dir)
    assert resolve_dtype("auto", "cpu", config) == "float32"
    assert resolve_dtype("auto", "cuda", config) == "bfloat16"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", ""])
def test_other_dtypes_are_refused_with_those_that_may_be(model_dir: Path, dtype: str) -> None:
    with pytest.raises(InvalidArgument, match=r"must be auto or one of float32, bfloat16, float16$"):
        read_worker_model(model_dir, "cpu", dtype, 64, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_that_no_key_names_is_the_tensors(model_dir: Path, dtype: torch.dtype) -> None:
    unsaid = {key: value for key, value in CONFIG.items() if key != "dtype"} | {"model_type": "llama", "head_dim": 64}
    (model_dir / "config.json").write_text(json.dumps(unsaid))
    shapes = tensor_shapes(parse_model_config(unsaid))
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    served = read_worker_model(model_dir, "cuda", "auto", 64, 1).dtype
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    assert served == str(reference.dtype).removeprefix("torch.")
