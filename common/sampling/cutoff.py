"""Which weights top-k, top-p and min-p keep, expressed as one cutoff per row: weights below it are dropped.

A cutoff keeps all tokens that tie with the last one kept, so the answer does not depend on a sort's order.
Weights are exp((logit - max) / temperature), so that the largest of each row is exactly 1. `row_cutoff` is
the fast form for a CPU (one row at a time, sorting only the tokens that can matter), `cutoffs_device` the
vectorised one. This module knows nothing of rows' owners, seeds or draws.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

Float32Array = npt.NDArray[np.float32]

_GROUP_SIZE: Final = 16


def keep_likeliest(
    weights: torch.Tensor, rows: list[int], top_k: list[int], top_p: list[float], min_p: list[float]
) -> None:
    """Set to 0, in place, what each of `rows` drops: top-k, then top-p over what is left, then min-p.

    weights: [n, vocab] float32. The lists hold one value per entry of `rows`. A row with NaN stays harmless.
    """
    if weights.device.type == "cpu":
        _keep_on_host(weights, rows, top_k, top_p, min_p)
        return
    at = torch.tensor(rows, device=weights.device)
    kept = weights[at]
    weights[at] = torch.where(kept >= cutoffs_device(kept, top_k, top_p, min_p).view(-1, 1), kept, 0.0)


def _keep_on_host(
    weights: torch.Tensor, rows: list[int], top_k: list[int], top_p: list[float], min_p: list[float]
) -> None:
    table = weights.numpy()  # shares memory
    for row, k, p, m in zip(rows, top_k, top_p, min_p, strict=True):
        own = table[row]
        np.multiply(own, own >= row_cutoff(own, k, p, m), out=own)


def row_cutoff(row: Float32Array, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest weight that stays. row: [vocab] in [0, 1]; with NaN in it, the answer is 0."""
    cutoff = np.float32(min_p)  # min_p times the largest weight, which is 1
    if 0 < top_k < row.size:
        kth = _kth_largest(row, top_k)
        row = row[row >= kth]
        cutoff = max(cutoff, kth)
    if top_p < 1.0:
        total = float(row.sum(dtype=np.float64))
        if not total > 0.0:
            return 0.0
        # All weights up to `ignorable` together are less than half of what top-p drops: they need no sorting.
        ignorable = 0.5 * (1.0 - top_p) * total / row.size
        descending = np.sort(row[row > ignorable])[::-1]
        reached = np.cumsum(descending, dtype=np.float64)
        last = int(np.searchsorted(reached, top_p * total, side="left"))
        cutoff = max(cutoff, descending[min(last, descending.size - 1)])
    return float(cutoff)


def _kth_largest(row: Float32Array, k: int) -> np.float32:
    """row: [vocab]; NaN if it has NaN among its largest."""
    num_groups = row.size // _GROUP_SIZE
    if num_groups >= 2 * k:
        # The k-th largest of the groups' maxima is at most the k-th largest of all: what is below it cannot matter.
        maxima = row[: num_groups * _GROUP_SIZE].reshape(_GROUP_SIZE, num_groups).max(axis=0)
        contenders = row[row >= np.partition(maxima, num_groups - k)[num_groups - k]]
        row = contenders if contenders.size >= k else row
    return np.float32(np.partition(row, row.size - k)[row.size - k])


def cutoffs_device(weights: torch.Tensor, top_k: list[int], top_p: list[float], min_p: list[float]) -> torch.Tensor:
    """`row_cutoff` of each row, without synchronising with the host.

    weights: [n, vocab] float32 on any device. Returns [n] float32.
    """
    device = weights.device
    vocab_size = weights.shape[1]
    last_kept = torch.tensor([(k if 0 < k < vocab_size else vocab_size) - 1 for k in top_k], device=device)
    top_p_column = torch.tensor(top_p, dtype=torch.float64, device=device).view(-1, 1)
    descending = weights.sort(dim=-1, descending=True).values
    kth = descending.gather(1, last_kept.view(-1, 1))  # [n, 1]
    kept = descending * (descending >= kth)
    reached = kept.cumsum(dim=-1, dtype=torch.float64)
    below = reached < top_p_column * reached[:, -1:]
    last = below.sum(dim=-1, keepdim=True).clamp(max=vocab_size - 1)
    nucleus = torch.where(top_p_column < 1.0, descending.gather(1, last), 0.0)
    floor = torch.tensor(min_p, dtype=torch.float32, device=device).view(-1, 1)
    return torch.maximum(torch.maximum(kth, nucleus), floor).view(-1)
