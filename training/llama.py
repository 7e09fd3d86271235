"""A Llama for training; its modules have the names of the Hugging Face layout, and so have its weights.

It has no KV cache and cannot serve; `common/models` is the model that serves.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of the model. `dropout` acts in training only."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 704
    context_tokens: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    dropout: float = 0.1

    def hf_config(self) -> dict[str, object]:
        """config.json of this model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context_tokens,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": [0, 3],
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def rotary_tables(shape: LlamaShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [context_tokens, head_dim]; the second half repeats the first."""
    exponent = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(shape.context_tokens, device=device).float(), shape.rope_theta**-exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, num_heads, num_tokens, head_dim] with tables [num_tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        hidden, dim = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(hidden, shape.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * dim, hidden, bias=False)

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], num_heads, self.shape.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, num_tokens, hidden_size] → the same shape."""
        groups = self.shape.num_heads // self.shape.num_kv_heads
        q = rotate(self._heads(self.q_proj(x), self.shape.num_heads), cos, sin)
        k = rotate(self._heads(self.k_proj(x), self.shape.num_kv_heads), cos, sin)
        v = self._heads(self.v_proj(x), self.shape.num_kv_heads)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, num_tokens, hidden_size] → the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each behind a norm, with dropout on what they add to the residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Mlp(shape)
        self._dropout = shape.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, num_tokens, hidden_size] → the same shape."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self._dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self._dropout, self.training)


class Decoder(nn.Module):
    """Embedding, layers and last norm: the part that the Hugging Face layout names `model`."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Llama(nn.Module):
    """The whole model; the output matrix is the embedding."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.num_layers) ** 0.5 if residual else 0.02)

    def logits(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """ids int64 [batch, num_tokens] → [batch, num_tokens, vocab_size]; tables as rotary_tables makes them."""
        cos, sin = cos[: ids.shape[1]], sin[: ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def forward(self, ids: Tensor, targets: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mean cross-entropy of `targets` given `ids`, both int64 [batch, num_tokens]; float32 []."""
        return F.cross_entropy(self.logits(ids, cos, sin).float().flatten(0, 1), targets.flatten())
