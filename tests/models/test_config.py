"""Reading `config.json`: both generations of keys, and refusals that name what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ModelError
from common.models.config import RopeConfig, parse_model_config, read_model_config

BASE: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_ROPE = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 64)


def with_architecture(name: str, **changes: object) -> dict[str, object]:
    return BASE | {"architectures": [f"{name}ForCausalLM"]} | changes


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_SCALING}},
    ],
)
def test_old_and_new_rope_keys_mean_the_same(keys: dict[str, object]) -> None:
    assert parse_model_config(BASE | keys, {}).rope == LLAMA3_ROPE


def test_plain_rope_has_the_customary_base() -> None:
    assert parse_model_config(BASE, {}).rope == RopeConfig("default", 10000.0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_either_dtype_key_is_read(key: str) -> None:
    assert parse_model_config(BASE | {key: "bfloat16"}, {}).dtype == "bfloat16"


def test_the_generation_config_decides_which_tokens_end_a_text() -> None:
    config = BASE | {"eos_token_id": 2}
    assert parse_model_config(config, {"eos_token_id": [5, 7]}).eos_token_ids == (5, 7)
    assert parse_model_config(config, {"temperature": 0.6}).eos_token_ids == (2,)
    assert parse_model_config(BASE, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (with_architecture("Mistral", sliding_window=None), (None, None, None)),
        (with_architecture("Mistral", sliding_window=32), (32, 32, 32)),
        (with_architecture("Qwen2", sliding_window=32, use_sliding_window=False), (None, None, None)),
        (
            with_architecture("Qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=2),
            (None, None, 32),
        ),
        (
            with_architecture("Qwen3", sliding_window=32, use_sliding_window=True, max_window_layers=0),
            (32, 32, 32),
        ),
        (
            with_architecture(
                "Qwen2",
                sliding_window=32,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            (32, None, 32),
        ),
    ],
)
def test_windows_apply_only_where_the_family_uses_them(
    config: dict[str, object], windows: tuple[int | None, ...]
) -> None:
    assert parse_model_config(config, {}).windows == windows


def test_families_differ_in_flags() -> None:
    llama = parse_model_config(BASE, {})
    qwen2 = parse_model_config(with_architecture("Qwen2"), {})
    qwen3 = parse_model_config(with_architecture("Qwen3", head_dim=32), {})
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim) == (False, False, 16)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "architecture None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
        ({"architectures": [{}]}, "architecture"),
        (
            with_architecture("Qwen2", sliding_window=32, use_sliding_window=True, layer_types=[{}, [], "x"]),
            "layer_types",
        ),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"head_dim": 17}, "head_dim"),
        ({"dtype": "float8"}, "float8"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_model_config(BASE | changes, {})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match="no JSON object"):
        read_model_config(tmp_path)


def test_reading_a_config_does_not_load_torch() -> None:
    code = "import sys, common.models.config, common.models.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
