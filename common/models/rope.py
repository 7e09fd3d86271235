"""Rotary position embedding: the angles of a batch's positions, with the frequency scaling of `RopeConfig`.

On a CPU angles are computed per step, as a table over a context of 128k tokens costs more than it saves; on a GPU,
where each small operation costs a launch, they are looked up. `llama3` stretches wavelengths beyond the original
context, as Llama 3.1 was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from common.models.rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class Rotation:
    """x·cos + roll(x, head_dim / 2)·sin rotates a head x; `sin` carries the sign of the swapped halves."""

    cos: torch.Tensor  # [T, 1, head_dim], the model's dtype
    sin: torch.Tensor  # [T, 1, head_dim], first half negated


class RotaryEmbedding:
    """The rotation of a model's heads at given positions."""

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        num_tabled: int = 0,
    ) -> None:
        """`num_tabled`: positions whose rotation is kept in memory; 0, or all that will be asked for."""
        self._dtype = dtype
        self._inverse_frequencies = inverse_frequencies(config, head_dim).to(device)
        self._table = self._computed(torch.arange(num_tabled, device=device)) if num_tabled else None

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """positions: [T] int64."""
        if self._table is None:
            return self._computed(positions)
        return Rotation(self._table.cos.index_select(0, positions), self._table.sin.index_select(0, positions))

    def _computed(self, positions: torch.Tensor) -> Rotation:
        angles = positions.to(torch.float32).unsqueeze(1) * self._inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return Rotation(
            cos=torch.cat((cos, cos), dim=1).unsqueeze(1).to(self._dtype),
            sin=torch.cat((-sin, sin), dim=1).unsqueeze(1).to(self._dtype),
        )


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32, radians per token."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies: torch.Tensor = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _stretch_long_waves(frequencies, config)
    return frequencies


def _stretch_long_waves(frequencies: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Keep short waves, divide long ones by `factor`, and go over smoothly between the two."""
    waves_per_context = config.original_context_length * frequencies / (2 * math.pi)
    share_kept = (waves_per_context - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    share_kept = share_kept.clamp(0.0, 1.0)
    return share_kept * frequencies + (1.0 - share_kept) * frequencies / config.factor
