"""What a Hugging Face `config.json` says about a decoder, as one frozen value; what is unsupported is named.

Covers Llama, Qwen2, Qwen3 and Mistral: they differ in flags, not in structure. Both the old keys (`rope_theta`,
`rope_scaling`, `torch_dtype`) and those of transformers 5 (`rope_parameters`, `dtype`) are read. Knows neither torch
nor weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from common.errors import ModelError

Json = Mapping[str, object]

DTYPES: Final = ("float32", "bfloat16", "float16")  # of checkpoints, and of what is computed with them

_ARCHITECTURES: Final = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
_LAYER_TYPES: Final = ("full_attention", "sliding_attention")
_DEFAULT_ROPE_THETA: Final = 10000.0
_DEFAULT_WINDOW: Final = 4096  # transformers' value where the key is absent; null means no window
_DEFAULT_MAX_WINDOW_LAYERS: Final = 28


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` stretches positions; the last three fields are for `llama3` only."""

    kind: Literal["default", "linear", "llama3"]
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer: RMSNorm, rotary attention with grouped KV heads, SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    context_length: int  # tokens, prompt and output together
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of Q and K before the rotation
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]  # per layer: how many tokens a token sees, itself included; None = all
    dtype: str  # of the checkpoint
    eos_token_ids: tuple[int, ...]


def read_model_config(model_dir: Path) -> ModelConfig:
    """Parse `config.json`, and `generation_config.json` if there is one. Raises `ModelError`."""
    generation = model_dir / "generation_config.json"
    return parse_model_config(
        _read_json(model_dir / "config.json"), _read_json(generation) if generation.exists() else {}
    )


def parse_model_config(config: Json, generation_config: Json) -> ModelConfig:
    """The pure half of `read_model_config`."""
    architecture = _architecture(config)
    family = _ARCHITECTURES[architecture]
    _refuse_unsupported(config)
    num_heads = _positive(config, "num_attention_heads")
    hidden_size = _positive(config, "hidden_size")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"num_attention_heads = {num_heads} is no multiple of num_key_value_heads = {num_kv_heads}")
    head_dim = _positive(config, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"head_dim = {head_dim} is odd, which rotary embeddings do not allow")
    attention_bias = family in ("llama", "qwen3") and config.get("attention_bias", False) is True
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        context_length=_positive(config, "max_position_embeddings"),
        rope=_rope(config),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and config.get("mlp_bias", False) is True,
        qk_norm=family == "qwen3",
        tie_word_embeddings=config.get("tie_word_embeddings", False) is True,
        windows=_windows(config, family),
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids(config, generation_config),
    )


def _architecture(config: Json) -> str:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ModelError(f"architecture {architecture!r} is not supported; these are: {', '.join(_ARCHITECTURES)}")
    return architecture


def _refuse_unsupported(config: Json) -> None:
    if (quantization := config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(f"quantization {method!r} is not supported")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelError(f"activation {activation!r} is not supported, only 'silu'")
    if config.get("pretraining_tp", 1) not in (None, 1):
        raise ModelError(f"pretraining_tp = {config['pretraining_tp']!r} is not supported, only 1")


def _rope(config: Json) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"rope parameters {scaling!r} are no object")
    theta = _number(scaling, "rope_theta", _number(config, "rope_theta", _DEFAULT_ROPE_THETA))
    if _number(scaling, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("partial_rotary_factor is not supported, only 1.0")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig("default", theta)
    factor = _number(scaling, "factor")
    if kind == "linear":
        return RopeConfig("linear", theta, factor)
    if kind == "llama3":
        original = _positive(scaling, "original_max_position_embeddings", _positive(config, "max_position_embeddings"))
        low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
        return RopeConfig("llama3", theta, factor, low, high, original)
    raise ModelError(f"rope type {kind!r} is not supported; these are: default, linear, llama3")


def _windows(config: Json, family: str) -> tuple[int | None, ...]:
    num_layers = _positive(config, "num_hidden_layers")
    enabled = family == "mistral" or (family != "llama" and config.get("use_sliding_window", False) is True)
    if not enabled or config.get("sliding_window", _DEFAULT_WINDOW) is None:
        return (None,) * num_layers
    window = _positive(config, "sliding_window", _DEFAULT_WINDOW)
    if isinstance(layer_types := config.get("layer_types"), list) and family != "mistral":
        if len(layer_types) != num_layers or any(kind not in _LAYER_TYPES for kind in layer_types):
            raise ModelError(f"layer_types = {layer_types!r} does not fit {num_layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = 0 if family == "mistral" else config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if not isinstance(first, int) or first < 0:
        raise ModelError(f"config.json: max_window_layers = {first!r}, expected an integer from 0")
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _dtype(config: Json) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; these are: {', '.join(DTYPES)}")
    return str(dtype)


def _eos_token_ids(config: Json, generation_config: Json) -> tuple[int, ...]:
    """The generation config, if it names any, is what `generate` obeys."""
    for source in (generation_config, config):
        eos = source.get("eos_token_id")
        if eos is not None:
            ids = eos if isinstance(eos, list) else [eos]
            if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
                raise ModelError(f"eos_token_id = {eos!r} is neither a token id nor a list of them")
            return tuple(ids)
    return ()


def _positive(config: Json, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} = {value!r}, expected a positive integer")
    return value


def _number(config: Json, key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"config.json: {key} = {value!r}, expected a positive number")
    return float(value)


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
