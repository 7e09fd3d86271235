"""Drawing a token from unnormalised weights with one given uniform: the inverse of the cumulative sum in id
order.

A two-level sum (blocks of ids, then ids) makes this a few reductions instead of a scan over the vocabulary,
and its order of additions does not depend on the batch. This module knows nothing of temperature, penalties
or seeds.
"""

from __future__ import annotations

from typing import Final

import torch

_SPAN: Final = 128  # token ids in one block of the two-level sum


def padded_size(vocab_size: int) -> int:
    """The smallest multiple of the span that holds the vocabulary."""
    return -(-vocab_size // _SPAN) * _SPAN


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """weights: [n, padded vocab] float32, not negative, padding 0. uniforms: [n] float64 in [0, 1).

    Returns [n] int64: the first token id at which the running sum exceeds uniform * total, so never one of
    weight 0. A row that has NaN or no weight gives some id within bounds.
    """
    spans = weights.view(weights.shape[0], -1, _SPAN)
    span_ends = spans.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [n, spans]
    target = uniforms.view(-1, 1) * span_ends[:, -1:]
    span = _first_above(span_ends, target)  # [n, 1]
    start = torch.where(span > 0, span_ends.gather(1, (span - 1).clamp(min=0)), 0.0)
    within = spans.gather(1, span.unsqueeze(-1).expand(-1, 1, _SPAN)).squeeze(1)
    ends = within.cumsum(dim=-1, dtype=torch.float64)  # [n, _SPAN]
    return (span * _SPAN + _first_above(ends, target - start)).view(-1)


def _first_above(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index whose running sum exceeds the target. ends: [n, m]; target: [n, 1]; returns [n, 1]."""
    # Rounding may push the target to the very end of the sum: step back, to find the last entry with weight.
    last = ends[:, -1:]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
