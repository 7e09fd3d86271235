"""The two-level inverse of the cumulative sum against a plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling.draw import draw, padded_size

LARGEST_UNIFORM = 1.0 - 2.0**-53


def draw_one(weights: list[float], uniform: float) -> int:
    row = torch.zeros(1, padded_size(len(weights)))
    row[0, : len(weights)] = torch.tensor(weights)
    return int(draw(row, torch.tensor([uniform], dtype=torch.float64)))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=300).filter(any),
    st.integers(0, 2**53 - 1).map(lambda bits: bits * 2.0**-53),
)
def test_draw_is_the_first_id_whose_running_sum_exceeds_the_target(eighths: list[int], uniform: float) -> None:
    weights = np.array(eighths) / 8
    ends = np.cumsum(weights)
    expected = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
    expected = min(expected, int(np.flatnonzero(weights)[-1]))
    assert draw_one(weights.tolist(), uniform) == expected


@pytest.mark.parametrize("uniform", [0.0, 0.3, LARGEST_UNIFORM])
@pytest.mark.parametrize("only", [0, 127, 128, 200])
def test_token_of_weight_zero_is_never_drawn(uniform: float, only: int) -> None:
    weights = [0.0] * 300
    weights[only] = 1e-30
    assert draw_one(weights, uniform) == only


def test_largest_uniform_draws_within_tiny_uneven_weights() -> None:
    weights = [0.1 + 1e-7 * i for i in range(299)]
    assert draw_one(weights, LARGEST_UNIFORM) == 298


def test_row_of_nan_gives_an_id_within_bounds() -> None:
    assert 0 <= draw_one([float("nan")] * 300, 0.5) < padded_size(300)
