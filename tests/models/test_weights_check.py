"""A checkpoint whose tensors are not the model that its configuration describes is refused, with the tensor's name."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from common.errors import ModelError
from common.kernels import reference
from common.models.config import read_model_config
from common.models.tensor_shapes import tensor_shapes
from common.models.weights import load_weights
from common.models.weights_check import check_weights
from common.parallel.sharding import shard_of
from tests.models.paged_run import CPU, load_decoder, load_reference, paged_logprobs, random_tokens, reference_logprobs
from tests.models.tiny_checkpoints import FAMILIES, VOCAB_SIZE, write_tiny_checkpoint

Tensors = dict[str, torch.Tensor]
PROMPT: Final = random_tokens(40, VOCAB_SIZE, seed=1)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYER: Final = "model.layers.1."


@pytest.fixture(scope="module", autouse=True)
def quiet_and_alone() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check(path: Path) -> None:
    check_weights(path, read_model_config(path))


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_that_a_checkpoint_holds_is_read_and_no_other(family: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(family, tmp_path, seed=1)
    config = read_model_config(path)
    check(path)
    shapes = tensor_shapes(config)
    weights = load_weights(path, config, shard_of(config, 0, 1), torch.float32, CPU, reference.layout_weight)
    assert weights.num_parameters == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama_tied", tmp_path, seed=1)
    rewrite(path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    check(path)
    rewrite(path, lambda tensors: tensors[HEAD][-1, -1].add_(1.0))
    with pytest.raises(ModelError, match=r"safetensors: tensor lm_head\.weight is not .*tie_word_embeddings = True"):
        check(path)


def test_what_old_conversions_stored_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama2", tmp_path, seed=1)
    names = ("model.layers.2.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(8) for name in names}))
    check(path)


def as_int8(tensors: Tensors) -> None:
    tensors[LAYER + "mlp.up_proj.weight"] = tensors[LAYER + "mlp.up_proj.weight"].to(torch.int8)


def as_fp8(tensors: Tensors) -> None:
    name = LAYER + "mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), LAYER + "mlp.up_proj.weight_scale": torch.ones(1)}


def as_gptq(tensors: Tensors) -> None:
    del tensors[LAYER + "mlp.up_proj.weight"]
    parts = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}
    tensors |= {LAYER + f"mlp.up_proj.{part}": torch.ones(8, 8).to(dtype) for part, dtype in parts.items()}


def as_bitsandbytes(tensors: Tensors) -> None:
    name = LAYER + "mlp.up_proj.weight"
    tensors |= {name: torch.ones(5632, 1, dtype=torch.uint8), name + ".absmax": torch.ones(88)}


def with_kv_scales(tensors: Tensors) -> None:
    tensors[LAYER + "self_attn.k_scale"] = torch.ones(1)


@pytest.mark.parametrize("change", [as_int8, as_fp8, as_gptq, as_bitsandbytes, with_kv_scales])
def test_quantised_weights_are_called_so_without_a_key_in_the_configuration(
    change: Callable[[Tensors], None], tmp_path: Path
) -> None:
    path = write_tiny_checkpoint("llama2", tmp_path, seed=1)
    rewrite(path, change)
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor model\.layers\.1\..* dtype .*is quantised"):
        check(path)


def test_a_file_that_contradicts_itself_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama2", tmp_path, seed=1)
    file = path / "model.safetensors"
    content = file.read_bytes()
    (num_bytes,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + num_bytes].replace(b'"shape":[320,64]', b'"shape":[320,65]')
    file.write_bytes(content[:8] + header + content[8 + num_bytes :])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: .*"):
        check(path)


def test_checking_weights_does_not_load_torch() -> None:
    code = "import sys, common.models.weights_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


# What may happen to a tensor, and to which.
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn)
_NAMES: Final = (
    EMBEDDING,
    HEAD,
    "model.norm.weight",
    LAYER + "self_attn.q_proj.weight",
    LAYER + "self_attn.o_proj.bias",
    LAYER + "self_attn.q_norm.weight",
    LAYER + "self_attn.rotary_emb.inv_freq",
    LAYER + "mlp.up_proj.weight",
    LAYER + "mlp.up_proj.weight_scale",
    "model.layers.3.input_layernorm.weight",
    "model.norm.bias",
    "lm_head.bias",
    "v_head.summary.weight",
)
_CHANGES: Final = st.one_of(
    st.just(None),
    st.just("removed"),
    st.just("transposed"),
    st.just("cut"),
    st.just("as the embedding"),
    st.sampled_from(_DTYPES),
)


@cache
def checkpoint(family: str) -> tuple[Path, Tensors]:
    path = write_tiny_checkpoint(family, Path(mkdtemp()), seed=3)
    return path, load_file(path / "model.safetensors")


def changed_tensors(tensors: Tensors, name: str, change: object) -> Tensors:
    """`name` may be new: then there is a tensor of ones, and the change is made to it."""
    tensor = tensors.get(name, torch.ones(64))
    if change == "removed":
        return {other: kept for other, kept in tensors.items() if other != name}
    if change == "transposed":
        tensor = tensor.t().contiguous() if tensor.dim() == 2 else tensor.unsqueeze(0)
    elif change == "cut":
        tensor = tensor[:-1].contiguous()
    elif change == "as the embedding":
        tensor = tensors.get(EMBEDDING, tensor).clone()
    elif isinstance(change, torch.dtype):
        tensor = tensor.to(change)
    return tensors | {name: tensor}


def assert_told(text: str, path: Path, changes: dict[str, object]) -> None:
    """In one line, with the file or directory, a tensor that was changed, and what is wrong with it."""
    told = re.search(r"tensor (\S+) (is missing|has|is not|of shape) ", text)
    assert told is not None, text
    assert told[1] in changes
    assert str(path) in text
    assert "\n" not in text


@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(("llama2", "llama_bias", "llama_tied", "qwen2", "qwen3")),
    changes=st.dictionaries(st.sampled_from(_NAMES), _CHANGES, min_size=1, max_size=2),
)
def test_whatever_the_tensors_are_they_are_all_used_as_transformers_does_or_refused(
    family: str, changes: dict[str, object]
) -> None:
    path, tensors = checkpoint(family)
    for name, change in changes.items():
        tensors = changed_tensors(tensors, name, change)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    try:
        check(path)
    except ModelError as error:
        assert_told(str(error), path, changes)
        return
    (own,) = paged_logprobs(load_decoder(path), [PROMPT], [[len(PROMPT) - 1], [1]], seed=1)
    assert (own - reference_logprobs(load_reference(path), PROMPT)).abs().max().item() < 1e-4


def test_the_configuration_decides_what_is_read(tmp_path: Path) -> None:
    """Stored biases that no key asks for are told, and what a smaller model would leave out."""
    path = write_tiny_checkpoint("llama_bias", tmp_path, seed=1)
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.self_attn\.\w+\.bias .*and 9 more"):
        check(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(
        ModelError, match=r"tensor model\.layers\.2\..* nothing in config\.json makes LlamaForCausalLM read"
    ):
        check(path)
