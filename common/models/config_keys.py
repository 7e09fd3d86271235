"""What transformers makes of each key of `config.json`, family by family, as data; nothing here is computed.

A key is *declared* (its JSON type is checked, as transformers checks it), *neutral* (it reaches code that all models
share, and is served only at values that change nothing there), or unknown to transformers, which ignores it. Declared
keys with a meaning are read in `config` and `rope_config`; the others change nothing for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

ARCHITECTURES: Final = {  # and their `model_type`
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}

_EVERY_FAMILY: Final = {
    "vocab_size": "integer",
    "hidden_size": "integer",
    "intermediate_size": "integer",
    "num_hidden_layers": "integer",
    "num_attention_heads": "integer",
    "num_key_value_heads": "integer|null",
    "hidden_act": "string",
    "max_position_embeddings": "integer",
    "initializer_range": "fraction",
    "rms_norm_eps": "fraction",
    "use_cache": "boolean",
    "tie_word_embeddings": "boolean",
    "rope_parameters": "object|null",
    "rope_scaling": "object|null",
    "attention_dropout": "integer|fraction",
    "pad_token_id": "integer|null",
    "bos_token_id": "integer|null",
    "eos_token_id": "integer|integers|null",
    "id2label": "object|null",
    "num_labels": "integer",
    "auto_map": "object",
}
_QWEN: Final = {
    "use_sliding_window": "boolean",
    "sliding_window": "integer|null",
    "max_window_layers": "integer",
    "layer_types": "strings|null",
}
DECLARED: Final[Mapping[str, Mapping[str, str]]] = {
    "llama": _EVERY_FAMILY
    | {
        "head_dim": "integer|null",
        "attention_bias": "boolean",
        "mlp_bias": "boolean",
        "attention_dropout": "integer|fraction|null",
        "pretraining_tp": "integer|null",
        "layer_types": "strings|null",
    },
    "qwen2": _EVERY_FAMILY | _QWEN | {"head_dim": "integer"},
    "qwen3": _EVERY_FAMILY | _QWEN | {"head_dim": "integer", "attention_bias": "boolean"},
    "mistral": _EVERY_FAMILY
    | {"num_key_value_heads": "integer", "head_dim": "integer|null", "sliding_window": "integer|null"},
}

# Where the key is missing. Null, where it may be null, means one KV head for each query head.
DEFAULT_NUM_KV_HEADS: Final[Mapping[str, int | None]] = {"llama": None, "qwen2": 32, "qwen3": 32, "mistral": 8}

_ONLY_NULL: Final = (None,)
QUANTISATION: Final = ("quantization_config", "quantization", "compression_config")  # the second is mlx's
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(QUANTISATION, _ONLY_NULL),
    "is_causal": (True,),  # masks ask for it in every model
    "is_encoder_decoder": (False, None),
    "attention_chunk_size": _ONLY_NULL,  # the KV cache goes by it
    "kv_sharing_modes": _ONLY_NULL,
    "per_layer_config": _ONLY_NULL,
    "partial_rotary_factor": (None, 1.0, 1),
    "text_config": _ONLY_NULL,  # a model in a model: its settings would be taken instead
    "text_encoder": _ONLY_NULL,
    "decoder": _ONLY_NULL,
    "generator": _ONLY_NULL,
    "return_dict": (True,),
    "problem_type": _ONLY_NULL,
    "attn_implementation": (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "experts_implementation": _ONLY_NULL,
    "fusion_config": _ONLY_NULL,
    "distributed_config": _ONLY_NULL,
    "transformers_weights": _ONLY_NULL,  # names another file of weights
    "configuration_files": (),  # names other configurations
    "attribute_map": (),  # renames other keys
}
NEUTRAL: Final[Mapping[str, Mapping[str, tuple[object, ...]]]] = {
    "llama": _NEUTRAL | {"sliding_window": _ONLY_NULL},  # the KV cache goes by it, attention does not
    "qwen2": _NEUTRAL,
    "qwen3": _NEUTRAL,
    "mistral": _NEUTRAL | {"layer_types": ()},  # whatever it holds, transformers loads another family, Ministral
}

LAYER_TYPES: Final = ("full_attention", "sliding_attention")
# Of any model: a key of rope settings with such a name holds settings for those layers alone.
ALL_LAYER_TYPES: Final = (
    *LAYER_TYPES,
    "chunked_attention",
    "window_attention",
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
    "conv",
    "moe",
    "hybrid",
    "hybrid_sliding",
    "reference_sliding_attention",
    "linear_attention",
)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# The words of `DECLARED`: what they admit, and how a message says it. As in transformers, an integer is no fraction.
TYPES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "integer": (_is_integer, "an integer"),
    "integers": (lambda value: isinstance(value, list) and all(map(_is_integer, value)), "a list of integers"),
    "fraction": (lambda value: isinstance(value, float), "a number with a decimal point"),
    "boolean": (lambda value: isinstance(value, bool), "true or false"),
    "string": (lambda value: isinstance(value, str), "a string"),
    "strings": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of strings",
    ),
    "object": (lambda value: isinstance(value, dict), "an object"),
    "null": (lambda value: value is None, "null"),
}
