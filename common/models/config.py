"""What a Hugging Face `config.json` says about a decoder, as one frozen value; what is unsupported is named.

Covers Llama, Qwen2, Qwen3 and Mistral: they differ in flags, not in structure. Every key means here what it means to
transformers, or is refused (`config_keys`). Which tokens end a text is the router's to know. Knows neither torch nor
weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ModelError
from common.models.config_keys import (
    ARCHITECTURES,
    DECLARED,
    DEFAULT_NUM_KV_HEADS,
    LAYER_TYPES,
    NEUTRAL,
    QUANTISATION,
    TYPES,
)
from common.models.foreign_formats import foreign_format
from common.models.json_object import JsonObject, is_same, read_json_object
from common.models.rope_config import RopeConfig, parse_rope

DTYPES: Final = ("float32", "bfloat16", "float16")  # of checkpoints, and of what is computed with them

_CONFIG_FILE: Final = "config.json"
_ACTIVATIONS: Final = ("silu", "swish")  # two names of one function
_MAX_LAYERS: Final = 4096
_MIN_WINDOW: Final = 2  # with 1, transformers' KV cache and its attention do not agree what a token sees
_DEFAULT_WINDOW: Final = 4096  # transformers' value where the key is absent; null means no window
_DEFAULT_MAX_WINDOW_LAYERS: Final = 28
_DEFAULT_QWEN3_HEAD_DIM: Final = 128
_DEFAULT_EPS: Final = 1e-6
_MAX_LABELS: Final = 1 << 16  # transformers names each, for models that classify
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")


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
    dtype: str | None  # of the checkpoint; None: whatever its tensors are of


def read_model_config(model_dir: Path) -> ModelConfig:
    """Parse `config.json`. Raises `ModelError`."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir} is not a directory")
    path = model_dir / _CONFIG_FILE
    if not path.exists() and (found := foreign_format(model_dir)) is not None:
        raise ModelError(f"{path} is missing; {found}")
    return _parse(read_json_object(path))


def parse_model_config(config: Mapping[str, object]) -> ModelConfig:
    """The pure half of `read_model_config`."""
    return _parse(JsonObject(_CONFIG_FILE, config))


def _parse(config: JsonObject) -> ModelConfig:
    architecture = _architecture(config)
    family = ARCHITECTURES[architecture]
    _check_types(config, family)
    _check_neutral(config, family)
    num_heads, num_kv_heads = _heads(config, family)
    attention_bias = family in ("llama", "qwen3") and config.flag("attention_bias")
    parsed = ModelConfig(
        architecture=architecture,
        vocab_size=config.positive("vocab_size"),
        hidden_size=config.positive("hidden_size"),
        intermediate_size=config.positive("intermediate_size"),
        num_layers=config.positive("num_hidden_layers", most=_MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, family, num_heads),
        rms_norm_eps=config.number("rms_norm_eps", _DEFAULT_EPS),
        context_length=config.positive("max_position_embeddings"),
        rope=parse_rope(config),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and config.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        windows=_windows(config, family),
        dtype=_dtype(config),
    )
    _check_what_only_constructs(config, family, parsed)
    return parsed


def _architecture(config: JsonObject) -> str:
    """As `architectures` says; `model_type`, by which transformers chooses, must not say another."""
    supported = f"supported are {', '.join(ARCHITECTURES)}"
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise config.refused("architectures", supported)
    family = ARCHITECTURES[architecture]
    if config.get("model_type", family) != family:
        raise config.refused("model_type", f"but architectures says {architecture}, which is {family!r}")
    return architecture


def _check_types(config: JsonObject, family: str) -> None:
    for key, declared in DECLARED[family].items():
        words = declared.split("|")
        if key in config and not any(TYPES[word][0](config.get(key)) for word in words):
            raise config.refused(key, f"expected {' or '.join(TYPES[word][1] for word in words)}")


def _check_neutral(config: JsonObject, family: str) -> None:
    for key, neutral in NEUTRAL[family].items():
        if key in config and not any(is_same(config.get(key), value) for value in neutral):
            raise config.refused(key, _supported(key, neutral))
    if config.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise config.refused("hidden_act", "supported is only 'silu'")


def _supported(key: str, neutral: Sequence[object]) -> str:
    if key in QUANTISATION:
        return "the checkpoint is quantised, which is not supported"
    return f"supported is only {', '.join(map(repr, neutral))}" if neutral else "which is not supported"


def _heads(config: JsonObject, family: str) -> tuple[int, int]:
    """Query heads and KV heads."""
    num_heads, hidden_size = config.positive("num_attention_heads"), config.positive("hidden_size")
    missing = DEFAULT_NUM_KV_HEADS[family] if "num_key_value_heads" not in config else None
    num_kv_heads = config.positive("num_key_value_heads", missing or num_heads)
    if num_heads % num_kv_heads:
        raise config.refused("num_attention_heads", f"expected a multiple of num_key_value_heads = {num_kv_heads}")
    if family == "llama" and hidden_size % num_heads:
        raise config.refused("hidden_size", f"expected a multiple of num_attention_heads = {num_heads}")
    return num_heads, num_kv_heads


def _head_dim(config: JsonObject, family: str, num_heads: int) -> int:
    default = _DEFAULT_QWEN3_HEAD_DIM if family == "qwen3" else config.positive("hidden_size") // num_heads
    head_dim = config.positive("head_dim", default or None)
    if head_dim % 2:
        key = "head_dim" if config.get("head_dim") is not None else "hidden_size"
        raise config.refused(key, f"a head_dim of {head_dim} is odd, which rotary embeddings do not allow")
    return head_dim


def _windows(config: JsonObject, family: str) -> tuple[int | None, ...]:
    num_layers = config.positive("num_hidden_layers", most=_MAX_LAYERS)
    if family == "mistral":
        return (_window(config),) * num_layers
    window = _window(config) if family != "llama" and config.flag("use_sliding_window") else None
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        supported = LAYER_TYPES if window is not None else LAYER_TYPES[:1]
        if len(layer_types) != num_layers or any(kind not in supported for kind in layer_types):
            raise config.refused("layer_types", f"expected {num_layers} of {' or '.join(supported)}")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if window is None:
        return (None,) * num_layers
    first = config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if not isinstance(first, int) or first < 0:
        raise config.refused("max_window_layers", "expected an integer from 0")
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _window(config: JsonObject) -> int | None:
    if "sliding_window" in config and config.get("sliding_window") is None:
        return None
    return config.positive("sliding_window", _DEFAULT_WINDOW, least=_MIN_WINDOW)


def _dtype(config: JsonObject) -> str | None:
    """`torch_dtype` is read where `dtype` is missing or null."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if dtype is None:
        return None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise config.refused(key, f"supported are {', '.join(DTYPES)}")
    return dtype


def _check_what_only_constructs(config: JsonObject, family: str, parsed: ModelConfig) -> None:
    """Keys that change no answer, but with which transformers does not make the model."""
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and not -parsed.vocab_size <= pad < parsed.vocab_size:
        raise config.refused("pad_token_id", f"expected a token of the vocabulary, whose size is {parsed.vocab_size}")
    spread = config.get("initializer_range")
    if family == "llama" and isinstance(spread, float) and not 0.0 <= spread <= 1.0:
        raise config.refused("initializer_range", "expected a number from 0.0 to 1.0")
    num_labels = config.get("num_labels")
    if isinstance(num_labels, int) and num_labels > _MAX_LABELS:
        raise config.refused("num_labels", f"expected at most {_MAX_LABELS}")
    labels = config.get("id2label")
    if isinstance(labels, dict) and not all(_INTEGER.fullmatch(key) for key in labels):
        raise config.refused("id2label", "expected integers for keys")
