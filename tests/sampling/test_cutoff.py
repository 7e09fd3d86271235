"""Top-k, top-p and min-p against a direct reading of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling.cutoff import cutoffs_device, keep_likeliest, row_cutoff


def kept_by_definition(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Walk the tokens from the likeliest down; whole groups of equal weight stay or go together."""
    kept = list(range(len(weights)))
    if top_k:
        kth = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        kept = [i for i in kept if weights[i] >= kth]
    if top_p < 1.0:
        total = sum(float(weights[i]) for i in kept)
        mass, nucleus, last = 0.0, [], 2.0
        for i in sorted(kept, key=lambda i: -weights[i]):
            if mass >= top_p * total and weights[i] != last:
                break
            nucleus.append(i)
            mass += float(weights[i])
            last = weights[i]
        kept = nucleus
    return {i for i in kept if weights[i] >= np.float32(min_p)}


# Eighths make sums exact, so that the definition has one answer whatever the order of the additions; and ties are many.
weight_rows = st.lists(st.integers(0, 8), min_size=1, max_size=40).map(
    lambda eighths: np.array([1.0, *(e / 8 for e in eighths)], dtype=np.float32)
)


@settings(deadline=None, max_examples=300)
@given(
    weight_rows,
    st.integers(0, 45),
    st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_both_forms_keep_what_the_definition_keeps(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    expected = kept_by_definition(weights, top_k, top_p, min_p) - set(np.flatnonzero(weights == 0).tolist())
    on_device = cutoffs_device(torch.from_numpy(weights).view(1, -1), [top_k], [top_p], [min_p])
    for cutoff in (row_cutoff(weights, top_k, top_p, min_p), float(on_device)):
        kept = np.flatnonzero((weights >= np.float32(cutoff)) & (weights > 0))
        assert set(kept.tolist()) == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 1, 50])
def test_both_forms_agree_on_model_like_weights(top_p: float, top_k: int) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1)) * 3
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    on_device = cutoffs_device(weights, [top_k] * 8, [top_p] * 8, [0.01] * 8)
    on_host = [row_cutoff(row.numpy(), top_k, top_p, 0.01) for row in weights]
    assert on_device.tolist() == on_host


@pytest.mark.parametrize("vocab_size", [31, 64, 1000, 4097])
@pytest.mark.parametrize("top_k", [1, 7, 30])
def test_top_k_finds_the_kth_largest_of_any_vocabulary(vocab_size: int, top_k: int) -> None:
    for seed in range(5):
        row = np.random.default_rng(seed).random(vocab_size, dtype=np.float32).round(3)
        assert row_cutoff(row, top_k, 1.0, 0.0) == np.sort(row)[-top_k]


def test_only_the_named_rows_change() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.1], [1.0, 0.5, 0.1], [1.0, 0.5, 0.1]])
    keep_likeliest(weights, [0, 2], [1, 2], [1.0, 1.0], [0.0, 0.0])
    assert weights.tolist() == torch.tensor([[1.0, 0, 0], [1.0, 0.5, 0.1], [1.0, 0.5, 0]]).tolist()


def test_row_of_nan_leaves_its_neighbour_alone() -> None:
    for top_k, top_p in ((0, 0.9), (2, 0.9), (2, 1.0)):
        weights = torch.linspace(1.0, 0.0, 100).repeat(2, 1)
        weights[0, 50] = float("nan")
        keep_likeliest(weights, [0, 1], [top_k, 2], [top_p, 1.0], [0.0, 0.0])
        assert weights[1].nonzero().view(-1).tolist() == [0, 1]
