"""Draws configurations of tiny checkpoints with some keys changed to values that are valid, odd or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hypothesis import strategies as st

from common.models.config_keys import DECLARED, NEUTRAL

MISSING: Final = object()  # the key is taken out
BASES: Final = ("llama_bias", "llama_tied", "qwen2", "qwen2_window", "qwen3", "mistral", "mistral_window")
NUM_LAYERS: Final = 3

_ODD: Final[tuple[object, ...]] = (
    MISSING,
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    1.0,
    0.5,
    1e308 * 10,
    10**30,
    "",
    "x",
    [],
    [1],
    {},
    {"x": 1},
)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_PARTS: Final = {  # keys of rope settings
    "rope_type": ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "mrope", None, 1),
    "type": ("default", "linear", "llama3", "yarn", "mrope", None),
    "rope_theta": (10000.0, 10000, 1e6, None, "x", 0),
    "factor": (2.0, 4, 0.5, None, "x", True),
    "low_freq_factor": (1.0, 2, None),
    "high_freq_factor": (4.0, 1.0, 8, "x"),
    "original_max_position_embeddings": (16, 64, 8192, None, 16.0, "x"),
    "partial_rotary_factor": (1.0, 1, 0.5, None),
    "mrope_section": ([2, 3, 3],),
    "short_factor": ([1.0] * 8,),
    _FULL: ({"rope_type": "default", "rope_theta": 10000.0}, None),
    _SLIDING: ({"rope_type": "default", "rope_theta": 10000.0},),
}
_LLAMA3: Final = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _some_of(parts: Mapping[str, tuple[object, ...]]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in parts.items()})


def _rope() -> st.SearchStrategy[object]:
    """Whole recipes, with or without a few keys of their own, and any mixture of keys."""
    recipes = st.sampled_from(
        [
            {"rope_type": "default"},
            {"type": "linear", "factor": 2.0},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            {"rope_type": "llama3", "original_max_position_embeddings": 16, **_LLAMA3},
            {"type": "llama3", **_LLAMA3},
            {"rope_type": "llama3", "original_max_position_embeddings": 64, "rope_theta": 1e4, **_LLAMA3},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ]
    )
    few = st.dictionaries(st.sampled_from(sorted(_PARTS)), st.none(), max_size=1).flatmap(
        lambda keys: st.fixed_dictionaries({key: st.sampled_from(_PARTS[key]) for key in keys})
    )
    changed = st.builds(lambda recipe, change: recipe | change, recipes, few)
    return st.one_of(changed, changed, _some_of(_PARTS))


# Values with a meaning, beside the odd ones.
_MEANT: Final[Mapping[str, tuple[object, ...]]] = {
    "is_causal": (False, None, True),
    "architectures": (["LlamaForCausalLM"], ["Qwen2ForCausalLM"], ["LlamaForCausalLM", "x"]),
    "model_type": ("llama", "qwen2", "qwen3", "mistral", "ministral"),
    "num_hidden_layers": (2, 3, 4),
    "num_attention_heads": (4, 2, 8),
    "num_key_value_heads": (2, 4, 1),
    "head_dim": (16, 32, 15),
    "hidden_act": ("silu", "swish", "gelu"),
    "max_position_embeddings": (64, 100_000),
    "rms_norm_eps": (1e-5, 0.5),
    "initializer_range": (0.1, 2.0),
    "tie_word_embeddings": (True, False),
    "attention_dropout": (0.1, 0),
    "sliding_window": (8, 16, 4096),
    "max_window_layers": (0, 1, 28),
    "layer_types": ([_FULL] * 3, [_SLIDING, _FULL, _SLIDING], [_FULL] * 2, [_SLIDING] * 3, ["chunked_attention"] * 3),
    "pad_token_id": (0, 319, 320, -1, -400),
    "bos_token_id": (5,),
    "eos_token_id": ([1, 2], 3),
    "pretraining_tp": (2,),
    "rope_theta": (10000.0, 1e6, 500000),
    "original_max_position_embeddings": (16, 64, 16.0),
    "dtype": ("float32", "bfloat16", "float16", "int8", "float64"),
    "torch_dtype": ("float32", "bfloat16", "int8"),
    "quantization_config": ({"quant_method": "awq", "bits": 4},),
    "per_layer_config": ({"0": {"intermediate_size": 64}},),
    "text_config": ({"model_type": "llama"},),
    "attention_chunk_size": (8,),
    "id2label": ({"0": "a"}, {"a": "b"}),
    "auto_map": ({"AutoModelForCausalLM": "modeling.Other"},),
    "partial_rotary_factor": (1.0, 0.5),
}
# Keys of other families, or of none, which all of transformers passes over.
_UNKNOWN: Final = (
    "attn_logit_softcapping",
    "attention_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "use_mrope",
    "rope_interleaved",
    "output_attentions",
    "return_dict",
    "_name_or_path",
    "transformers_version",
    "chunk_size_feed_forward",
    "pruned_heads",
    "x_comment",
)
_PLACES_OF_ROPE: Final = ("rope_parameters", "rope_scaling")
KEYS: Final = sorted(
    {key for family in (*DECLARED.values(), *NEUTRAL.values()) for key in family}
    | set(_MEANT)
    | set(_UNKNOWN)
    | set(_PLACES_OF_ROPE)
)


def _value_of(key: str) -> st.SearchStrategy[object]:
    odd = st.sampled_from(_ODD)
    if key in _PLACES_OF_ROPE:
        return st.one_of(_rope(), _rope(), odd)
    meant = _MEANT.get(key, ())
    return st.one_of(st.sampled_from(meant), st.sampled_from(meant), odd) if meant else odd


def changes() -> st.SearchStrategy[dict[str, object]]:
    """One to three changed keys of all, or several of those of rotary embedding, which depend on each other."""
    keys = st.one_of(st.sampled_from(sorted(_MEANT)), st.sampled_from(KEYS))
    any_keys = st.lists(keys, min_size=1, max_size=3, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({key: _value_of(key) for key in chosen})
    )
    beside = {key: st.sampled_from(_MEANT[key]) for key in ("rope_theta", "original_max_position_embeddings")}
    rope = st.fixed_dictionaries({}, optional={key: _rope() for key in _PLACES_OF_ROPE} | beside)
    return st.one_of(any_keys, rope)


def changed(config: Mapping[str, object], change: Mapping[str, object]) -> dict[str, object]:
    """The configuration with the change."""
    merged = {**config, **change}
    return {key: value for key, value in merged.items() if value is not MISSING}
