"""Reading `config.json`: both generations of keys, and refusals that name what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ModelError
from common.models.config import parse_model_config, read_model_config
from common.models.rope_config import RopeConfig

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
    assert parse_model_config(BASE | keys).rope == LLAMA3_ROPE


def test_plain_rope_has_the_customary_base() -> None:
    assert parse_model_config(BASE).rope == RopeConfig("default", 10000.0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_either_dtype_key_is_read(key: str) -> None:
    assert parse_model_config(BASE | {key: "bfloat16"}).dtype == "bfloat16"


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
    assert parse_model_config(config).windows == windows


def test_families_differ_in_flags() -> None:
    llama = parse_model_config(BASE)
    qwen2 = parse_model_config(with_architecture("Qwen2"))
    qwen3 = parse_model_config(with_architecture("Qwen3", head_dim=32))
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim) == (False, False, 16)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "architectures = None"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
        ({"model_type": "qwen2"}, "model_type = 'qwen2', but architectures says LlamaForCausalLM"),
        ({"model_type": None}, "model_type = None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
        ({"architectures": [{}]}, "architecture"),
        (
            with_architecture("Qwen2", sliding_window=32, use_sliding_window=True, layer_types=[{}, [], "x"]),
            "layer_types",
        ),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": 10**19}, "rope_theta"),
        (with_architecture("Mistral", sliding_window=1), "sliding_window = 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, r"rope_scaling\.rope_type = 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, r"rope_scaling\.type = 'mrope'"),
        ({"rope_scaling": {"type": None}}, r"rope_scaling\.type = None"),
        ({"rope_scaling": {"rope_type": None, "type": "linear"}}, r"rope_scaling\.rope_type = None"),
        ({"rope_scaling": []}, r"rope_scaling = \[\], expected an object or null"),
        ({"rope_theta": None}, "rope_theta = None"),
        ({"rope_parameters": {"rope_theta": None}}, r"rope_parameters\.rope_theta = None"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING}, "original_max_position_embeddings": None},
            "original_max",
        ),
        ({"rope_scaling": LLAMA3_SCALING | {"type": "llama3", "high_freq_factor": 1.0}}, "high_freq_factor = 1.0"),
        (with_architecture("Qwen3", rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_parameters\.rope_theta = 1000000.0, but rope_scaling.* 10000.0",
        ),
        (with_architecture("Mistral", layer_types=None, sliding_window=None), "layer_types = None"),
        (with_architecture("Qwen2", layer_types=["sliding_attention"] * 3, sliding_window=8), "layer_types"),
        (with_architecture("Qwen3", layer_types=["full_attention"] * 2), "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"sliding_window": 32}, "sliding_window = 32"),
        ({"is_causal": False}, "is_causal = False"),
        ({"is_causal": None}, "is_causal = None"),
        ({"attention_bias": 1}, "attention_bias = 1, expected true or false"),
        ({"mlp_bias": None}, "mlp_bias = None"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings = 'true'"),
        (with_architecture("Qwen2", use_sliding_window=1), "use_sliding_window = 1"),
        (with_architecture("Qwen3", head_dim=None), "head_dim = None"),
        (with_architecture("Mistral", num_key_value_heads=None), "num_key_value_heads = None"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
        ({"rms_norm_eps": 1}, "rms_norm_eps = 1, expected a number with a decimal point"),
        ({"hidden_size": 66}, "hidden_size = 66, expected a multiple of num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
        ({"pad_token_id": 128}, "pad_token_id = 128"),
        ({"num_labels": 10**30}, "num_labels = 10"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
        ({"text_config": {}}, "text_config = {}"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'}, the checkpoint is quantised"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"head_dim": 17}, "head_dim"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": "", "torch_dtype": "bfloat16"}, "dtype = ''"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelError, match=rf"^config\.json: .*{named}"):
        parse_model_config(BASE | changes)


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        # `rope_scaling` goes before `rope_parameters`, and its theta is its own or the one beside both.
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig("linear", 10000.0, 2.0),
        ),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e6},
            },
            RopeConfig("linear", 1e6, 2.0),
        ),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}}, RopeConfig("default", 1e6)),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 10000.0}, RopeConfig("default", 1e6)),
        ({"rope_scaling": {"rope_type": "default", "type": "mrope"}}, RopeConfig("default", 10000.0)),
        # Of two original lengths the one beside the settings counts; without any, the model's.
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING}, "original_max_position_embeddings": 32},
            RopeConfig("llama3", 10000.0, 8.0, 1.0, 4.0, 32),
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            RopeConfig("llama3", 10000.0, 8.0, 1.0, 4.0, 256),
        ),
        ({"original_max_position_embeddings": "not read"}, RopeConfig("default", 10000.0)),
    ],
)
def test_rope_is_taken_from_where_transformers_takes_it(config: dict[str, object], rope: RopeConfig) -> None:
    assert parse_model_config(BASE | config).rope == rope


@pytest.mark.parametrize(("family", "num_kv_heads"), [("Llama", 32), ("Qwen2", 32), ("Qwen3", 32), ("Mistral", 8)])
def test_the_family_says_how_many_kv_heads_there_are_where_the_key_is_missing(family: str, num_kv_heads: int) -> None:
    config = with_architecture(family, num_attention_heads=32)
    del config["num_key_value_heads"]
    assert parse_model_config(config).num_kv_heads == num_kv_heads


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "logits_scaling": 8.0, "use_mrope": False, "unsloth_version": "2025.1"},
        {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False, "_name_or_path": "x"},
        {"quantization_config": None, "sliding_window": None, "layer_types": ["full_attention"] * 3},
        {"is_causal": True, "return_dict": True, "partial_rotary_factor": 1.0, "pad_token_id": -1},
    ],
)
def test_what_changes_nothing_is_passed_over(config: dict[str, object]) -> None:
    assert parse_model_config(BASE | config) == parse_model_config(BASE)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)
    with pytest.raises(ModelError, match=r"model\.gguf is not a directory"):
        read_model_config(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match="is not a JSON object"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (json.dumps(BASE).encode().replace(b"128", b"[" * 500 + b"]" * 500), r"vocab_size = \[\[\[\[\.\.\.\]\]\]\], "),
    ],
)
def test_whatever_the_file_holds_it_is_refused_in_one_line(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config\.json.*{named}") as error:
        read_model_config(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-q4.gguf", "model-q4.gguf is a GGUF file"),
        ("adapter_config.json", r"an adapter \(LoRA\)"),
        ("params.json", "the makers' own format"),
        ("pytorch_model.bin", "a pickle"),
    ],
)
def test_another_format_is_named(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ModelError, match=rf"config\.json is missing; {file} is .*{said}|; {said}"):
        read_model_config(tmp_path)


def test_reading_a_config_does_not_load_torch() -> None:
    code = "import sys, common.models.config, common.models.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
