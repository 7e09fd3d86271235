"""The forward pass of a decoder over a ragged batch, on one tensor-parallel rank.

Reads the order of a layer top to bottom; what differs between families are flags of `ModelConfig`, what differs between
devices is in the kernel backend. Knows neither requests nor sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from common.kernels.backend import KernelBackend, kernels_for
from common.kernels.batch import BatchPlan
from common.kernels.scaled_rows import NormedRows
from common.models.config import ModelConfig
from common.models.random_weights import RANDOM_SEED, random_weights
from common.models.rope import RotaryEmbedding, Rotation
from common.models.weights import LayerWeights, Linear, ModelWeights, load_weights
from common.parallel.group import TensorParallelGroup
from common.parallel.sharding import Shard, shard_of


class Decoder:
    """A model's shard on a device. `kernels` is the backend that its weights are laid out for."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        weights: ModelWeights,
        kernels: KernelBackend,
        group: TensorParallelGroup,
    ) -> None:
        self.config = config
        self.shard = shard
        self.kernels = kernels
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.num_parameters = weights.num_parameters
        self._weights = weights
        self._group = group
        num_tabled = config.context_length if self.device.type == "cuda" else 0
        self._rope = RotaryEmbedding(config.rope, config.head_dim, self.dtype, self.device, num_tabled)
        self._scale = config.head_dim**-0.5
        self._num_heads = len(shard.heads)

    @classmethod
    def load(
        cls,
        model_dir: Path | None,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> Decoder:
        """Read this rank's shard of a Hugging Face directory, or draw it if there is none. Raises `ModelError`."""
        shard = shard_of(config, group.rank, group.size)
        kernels = kernels_for(device)
        if model_dir is None:
            weights = random_weights(config, shard, dtype, device, RANDOM_SEED, kernels.layout_weight)
        else:
            weights = load_weights(model_dir, config, shard, dtype, device, kernels.layout_weight)
        return cls(config, shard, weights, kernels, group)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: BatchPlan,
        kv: torch.Tensor,
        on_stored: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Run all layers and store the tokens' K and V.

        token_ids, positions: [T] int64; kv: [num_layers, num_blocks, 2, local KV heads, block_size, head_dim].
        `on_stored` [none] is called for each layer, in order, behind what stores its K and V.
        Returns the hidden states before the final norm, [T, hidden]. The first number of one is not finite if K or V of
        its token was not, in whichever layer and on whichever rank: the blocks then hold zeros instead.
        """
        rotation = self._rope.rotation(positions)
        residual = self._embed(token_ids)
        layers = self._weights.layers
        x: NormedRows = self.kernels.rms_norm(residual, layers[0].input_norm, self.config.rms_norm_eps)
        for index, layer in enumerate(layers):
            attended = self._attention(x, layer, self.config.windows[index], rotation, kv[index], plan)
            if on_stored is not None:
                on_stored()
            x = self._linear_add_norm(attended, layer.o, residual, layer.post_norm)
            gated = self.kernels.gate_up_silu(x, layer.gate_up.weight, layer.gate_up.bias)
            if index + 1 < len(layers):
                x = self._linear_add_norm(gated, layer.down, residual, layers[index + 1].input_norm)
        part = self.kernels.linear(gated, layer.down.weight, layer.down.bias)
        self.kernels.spoil_cleaned(part, plan)
        return residual.add_(self._group.all_reduce(part))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [n, hidden] as `forward` returned it. Returns [n, vocab] float32, the same on every rank."""
        return self.head(hidden).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` in the model's dtype."""
        x = self.kernels.rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)
        own = self.kernels.linear(x, self._weights.head.weight, None)
        if self.shard.size == 1:
            return own
        gathered = self._group.all_gather(own)  # [size, n, vocab_stride]
        joined = gathered.transpose(0, 1).reshape(hidden.shape[0], -1)
        return joined[:, : self.config.vocab_size]

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, hidden]; each rank adds the rows of its part of the vocabulary."""
        if self.shard.size == 1:
            return functional.embedding(token_ids, self._weights.embedding)
        own = self.shard.vocab
        local = token_ids - own.start
        others = (local < 0) | (local >= len(own))
        if not own:
            return self._group.all_reduce(
                torch.zeros((*token_ids.shape, self.config.hidden_size), dtype=self.dtype, device=self.device)
            )
        rows = functional.embedding(local.clamp_(0, len(own) - 1), self._weights.embedding)
        # Not times zero: a row that is not finite would spoil every token of the other ranks.
        return self._group.all_reduce(rows.masked_fill_(others.unsqueeze(1), 0.0))

    def _attention(
        self,
        x: NormedRows,
        layer: LayerWeights,
        window: int | None,
        rotation: Rotation,
        kv_layer: torch.Tensor,
        plan: BatchPlan,
    ) -> torch.Tensor:
        """x: [T, hidden], normalised. Returns what this rank's heads found, [T, heads * head_dim]."""
        q = self.kernels.qkv_rope_store(
            x,
            layer.qkv.weight,
            layer.qkv.bias,
            self._num_heads,
            rotation.cos,
            rotation.sin,
            layer.q_norm,
            layer.k_norm,
            self.config.rms_norm_eps,
            kv_layer,
            plan,
        )
        return self.kernels.attention(q, kv_layer, plan, window, self._scale)

    def _linear_add_norm(
        self, x: torch.Tensor, linear: Linear, residual: torch.Tensor, norm: torch.Tensor
    ) -> NormedRows:
        """Add the ranks' sum of products to `residual`, [T, hidden], in place and return its norm."""
        eps = self.config.rms_norm_eps
        if self.shard.size == 1:
            return self.kernels.linear_add_norm(x, linear.weight, linear.bias, residual, norm, eps)
        part = self.kernels.linear(x, linear.weight, linear.bias)
        fused = self._group.all_reduce_add_rms_norm(part, residual, norm, eps)
        if fused is not None:
            return fused
        return self.kernels.add_rms_norm(self._group.all_reduce(part), residual, norm, eps)
