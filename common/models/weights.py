"""One rank's share of a model's weights, from wherever its tensors come.

QKV and gate/up are fused here, and every matrix is brought into the layout that the device's kernels want. Of a
safetensors checkpoint only the rows and columns of the shard leave the disk; a missing tensor, a wrong shape or an
unreadable dtype is a `ModelError` that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from common.errors import ModelError
from common.models.checkpoint import TensorEntry, tensor_entries
from common.models.config import ModelConfig
from common.models.tensor_shapes import EMBEDDING, FINAL_NORM, HEAD
from common.models.weights_check import check_tensor
from common.parallel.sharding import Shard


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x @ weight + bias."""

    weight: torch.Tensor  # [in, out]
    bias: torch.Tensor | None  # [out]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer, as far as this rank holds it."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # [hidden, (local heads + 2 * local KV heads) * head_dim]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    o: Linear  # [local heads * head_dim, hidden]; the bias is on rank 0 only, as the ranks' outputs are summed
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # [hidden, 2 * local intermediate]
    down: Linear  # [local intermediate, hidden]; bias on rank 0 only


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A rank's share of the model."""

    embedding: torch.Tensor  # [local vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [hidden]
    head: Linear  # [hidden, vocab_stride]; columns beyond the vocabulary are zero
    num_parameters: int  # on this rank; a tied embedding counts once


def load_weights(
    model_dir: Path,
    config: ModelConfig,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    layout_weight: Callable[[torch.Tensor], torch.Tensor],
) -> ModelWeights:
    """Read the shard. `layout_weight` turns [out, in] as stored into [in, out] as the kernels want it."""
    return assemble_weights(_Reader(model_dir, dtype, device), config, shard, layout_weight)


class TensorSource(Protocol):
    """The tensors of a whole model by name, of which a rank takes its part."""

    num_parameters: int  # of the parts that were taken

    def whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of that shape."""
        ...

    def rows(self, name: str, own: range, shape: tuple[int, ...]) -> torch.Tensor:
        """Rows `own` of the tensor of that shape."""
        ...

    def columns(self, name: str, own: range, shape: tuple[int, ...]) -> torch.Tensor:
        """Columns `own` of the matrix of that shape."""
        ...


def assemble_weights(
    source: TensorSource,
    config: ModelConfig,
    shard: Shard,
    layout_weight: Callable[[torch.Tensor], torch.Tensor],
) -> ModelWeights:
    """The shard's weights as the decoder wants them; see `load_weights`."""
    loader = _Loader(source, config, shard, layout_weight)
    hidden = config.hidden_size
    embedding = source.rows(EMBEDDING, shard.vocab, (config.vocab_size, hidden))
    layers = tuple(loader.layer(index) for index in range(config.num_layers))
    final_norm = source.whole(FINAL_NORM, (hidden,))
    head = embedding if config.tie_word_embeddings else source.rows(HEAD, shard.vocab, (config.vocab_size, hidden))
    padding = shard.vocab_stride - head.shape[0]
    if padding:
        head = torch.cat((head, head.new_zeros(padding, hidden)))
    return ModelWeights(embedding, layers, final_norm, Linear(layout_weight(head), None), source.num_parameters)


class _Loader:
    """Assembles layers from tensors; knows the names that all four families share."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        shard: Shard,
        layout_weight: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._source = source
        self._config = config
        self._layout = layout_weight
        dim = config.head_dim
        self._q = range(shard.heads.start * dim, shard.heads.stop * dim)
        self._kv = range(shard.kv_heads.start * dim, shard.kv_heads.stop * dim)
        self._intermediate = shard.intermediate
        self._sums_bias = shard.rank == 0

    def layer(self, index: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{index}."
        hidden, dim = config.hidden_size, config.head_dim
        all_q, all_kv = config.num_heads * dim, config.num_kv_heads * dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        norm = self._source.whole
        return LayerWeights(
            input_norm=norm(prefix + "input_layernorm.weight", (hidden,)),
            qkv=self._columns(
                [
                    (attention + "q_proj", self._q, all_q),
                    (attention + "k_proj", self._kv, all_kv),
                    (attention + "v_proj", self._kv, all_kv),
                ],
                config.qkv_bias,
            ),
            q_norm=norm(attention + "q_norm.weight", (dim,)) if config.qk_norm else None,
            k_norm=norm(attention + "k_norm.weight", (dim,)) if config.qk_norm else None,
            o=self._rows(attention + "o_proj", self._q, all_q, config.o_bias),
            post_norm=norm(prefix + "post_attention_layernorm.weight", (hidden,)),
            gate_up=self._columns(
                [(mlp + name, self._intermediate, config.intermediate_size) for name in ("gate_proj", "up_proj")],
                config.mlp_bias,
            ),
            down=self._rows(mlp + "down_proj", self._intermediate, config.intermediate_size, config.mlp_bias),
        )

    def _columns(self, parts: list[tuple[str, range, int]], has_bias: bool) -> Linear:
        """Several column-parallel matrices (name, this rank's outputs, all outputs) side by side."""
        hidden = self._config.hidden_size
        weights = [self._source.rows(f"{name}.weight", own, (total, hidden)) for name, own, total in parts]
        biases = [self._source.rows(f"{name}.bias", own, (total,)) for name, own, total in parts if has_bias]
        return Linear(self._layout(torch.cat(weights)), torch.cat(biases) if has_bias else None)

    def _rows(self, name: str, own: range, total: int, has_bias: bool) -> Linear:
        """One row-parallel matrix: this rank's inputs, all outputs."""
        hidden = self._config.hidden_size
        weight = self._source.columns(f"{name}.weight", own, (hidden, total))
        bias = self._source.whole(f"{name}.bias", (hidden,)) if has_bias and self._sums_bias else None
        return Linear(self._layout(weight), bias)


class _Slice(Protocol):
    """A tensor on disk; indexing reads."""

    def __getitem__(self, index: slice | tuple[slice, slice], /) -> torch.Tensor: ...


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged: {error}") from error


class _Reader:
    """A `TensorSource`: slices of a checkpoint's tensors, on the device and in the dtype asked for."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._entries = tensor_entries(model_dir)
        self._model_dir = model_dir
        self._dtype = dtype
        self._device = device
        self._open = {file: _open(file) for file in {entry.file for entry in self._entries.values()}}
        self.num_parameters = 0

    def whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.rows(name, range(shape[0]), shape)

    def rows(self, name: str, own: range, shape: tuple[int, ...]) -> torch.Tensor:
        entry = self._checked(name, shape)
        return self._placed(self._slice(entry, name)[own.start : own.stop])

    def columns(self, name: str, own: range, shape: tuple[int, ...]) -> torch.Tensor:
        entry = self._checked(name, shape)
        return self._placed(self._slice(entry, name)[:, own.start : own.stop])

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        return check_tensor(name, self._entries.get(name), shape, self._model_dir)

    def _slice(self, entry: TensorEntry, name: str) -> _Slice:
        return cast(_Slice, self._open[entry.file].get_slice(name))  # type: ignore[no-untyped-call]

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_parameters += tensor.numel()
        return tensor.to(device=self._device, dtype=self._dtype)
