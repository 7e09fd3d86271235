"""Which tensors make a model, by the names that all four families share, and of which shape. Pure."""

from __future__ import annotations

import re
from typing import Final

from common.models.config import ModelConfig

EMBEDDING: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"
HEAD: Final = "lm_head.weight"

# Old conversions stored what is computed from the configuration; transformers passes it over, as we do.
_COMPUTED: Final = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def is_computed(name: str) -> bool:
    """Whether the tensor is one that a checkpoint may hold and nobody reads."""
    return _COMPUTED.fullmatch(name) is not None


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All tensors that are read of a checkpoint."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes |= {prefix + name: shape for name, shape in _layer_shapes(config).items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    all_q, all_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {  # [out, in], and whether there is a bias
        "self_attn.q_proj": (all_q, hidden, config.qkv_bias),
        "self_attn.k_proj": (all_kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (all_kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, all_q, config.o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    for name, (num_out, num_in, has_bias) in matrices.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        if has_bias:
            shapes[f"{name}.bias"] = (num_out,)
    return shapes
