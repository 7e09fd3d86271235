"""Random weights of any shape, drawn on the device: a model's speed can be measured without a checkpoint.

The scale keeps activations near one through any number of layers, so that logits differ and no number overflows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.models.config import ModelConfig
from common.models.weights import LayerWeights, Linear, ModelWeights
from common.parallel.sharding import Shard


def random_weights(
    config: ModelConfig,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    layout_weight: Callable[[torch.Tensor], torch.Tensor],
) -> ModelWeights:
    """A rank's share of a random model. The same seed gives the same weights on the same kind of device."""
    source = _Source(dtype, device, seed)
    hidden, dim = config.hidden_size, config.head_dim
    num_q, num_kv = len(shard.heads) * dim, len(shard.kv_heads) * dim

    def linear(num_in: int, num_out: int, has_bias: bool) -> Linear:
        weight = layout_weight(source.normal((num_out, num_in), num_in**-0.5))
        return Linear(weight, source.normal((num_out,), 0.1) if has_bias else None)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=source.norm(hidden),
            qkv=linear(hidden, num_q + 2 * num_kv, config.qkv_bias),
            q_norm=source.norm(dim) if config.qk_norm else None,
            k_norm=source.norm(dim) if config.qk_norm else None,
            o=linear(num_q, hidden, config.o_bias and shard.rank == 0),
            post_norm=source.norm(hidden),
            gate_up=linear(hidden, 2 * len(shard.intermediate), config.mlp_bias),
            down=linear(len(shard.intermediate), hidden, config.mlp_bias and shard.rank == 0),
        )

    embedding = source.normal((len(shard.vocab), hidden), 1.0)
    layers = tuple(layer() for _ in range(config.num_layers))
    if config.tie_word_embeddings:
        head = torch.cat((embedding, embedding.new_zeros(shard.vocab_stride - len(shard.vocab), hidden)))
    else:
        head = source.normal((shard.vocab_stride, hidden), hidden**-0.5)
    return ModelWeights(
        embedding, layers, source.norm(hidden), Linear(layout_weight(head), None), source.num_parameters
    )


class _Source:
    """Seeded numbers; counts what it gave."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.num_parameters = 0

    def normal(self, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        self.num_parameters += torch.Size(shape).numel()
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(0.0, scale, generator=self._generator)

    def norm(self, size: int) -> torch.Tensor:
        """Near one, as norms are."""
        return self.normal((size,), 0.1).add_(1.0)
