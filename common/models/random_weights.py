"""Random weights of any shape, drawn on the device: a model's speed can be measured without a checkpoint.

Each tensor depends on the seed and its name alone, and is drawn whole: ranks of any tensor-parallel size hold parts of
one model (on one kind of device; generators differ between them). The scale keeps activations near one through any
number of layers, so that logits differ and no number overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Final

import torch

from common.models.config import ModelConfig
from common.models.tensor_shapes import EMBEDDING
from common.models.weights import ModelWeights, assemble_weights
from common.parallel.sharding import Shard

RANDOM_SEED: Final = 0  # of the model that workers draw: all of them must draw the same
_BIAS_SCALE: Final = 0.1
_NORM_SCALE: Final = 0.1


def random_weights(
    config: ModelConfig,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    layout_weight: Callable[[torch.Tensor], torch.Tensor],
) -> ModelWeights:
    """A rank's share of a random model. The same seed gives the same model on the same kind of device."""
    return assemble_weights(_DrawnTensors(dtype, device, seed), config, shard, layout_weight)


class _DrawnTensors:
    """A `TensorSource`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dtype = dtype
        self._device = device
        self._seed = seed
        self.num_parameters = 0

    def whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.rows(name, range(shape[0]), shape)

    def rows(self, name: str, own: range, shape: tuple[int, ...]) -> torch.Tensor:
        return self._taken(self._draw(name, shape)[own.start : own.stop])

    def columns(self, name: str, own: range, shape: tuple[int, ...]) -> torch.Tensor:
        return self._taken(self._draw(name, shape)[:, own.start : own.stop])

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        digest = blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.normal_(1.0, _NORM_SCALE, generator=generator)
        return tensor.normal_(0.0, _scale_of(name, shape), generator=generator)

    def _taken(self, part: torch.Tensor) -> torch.Tensor:
        """A copy, unless it is all there is: a part must not keep the whole alive."""
        self.num_parameters += part.numel()
        return part if part.numel() * part.itemsize == part.untyped_storage().nbytes() else part.clone()


def _scale_of(name: str, shape: tuple[int, ...]) -> float:
    if len(shape) == 1:
        return _BIAS_SCALE
    return 1.0 if name == EMBEDDING else float(shape[1] ** -0.5)
