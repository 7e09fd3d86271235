"""Products with few rows of the Triton backend, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from common.errors import InternalError
from common.kernels.linear_tuning import TUNED, LinearTuning, padded_rows
from common.kernels.triton_linear import (
    gate_up_silu_few,
    is_ahead,
    linear_add_few,
    linear_few,
    supports,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
# [T, in, out]: one row, ragged rows, inputs and outputs that fill no tile, all rows
SIZES = [(1, 64, 48), (5, 136, 72), (17, 256, 128), (64, 96, 40), (128, 96, 40)]
TUNINGS = [
    LinearTuning(32, 32, split, num_stages=3, swap=swap, use_tma=use_tma)
    for split, swap, use_tma in itertools.product((1, 2, 3), (False, True), (False, True))
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tuning_gives_the_product_and_its_endings(size: tuple[int, int, int], tuning: LinearTuning) -> None:
    rows, num_in, num_out = size
    x, weight = random(rows, num_in), random(2 * num_out, num_in, seed=1).t()
    residual = random(rows, 2 * num_out, seed=2)
    product = x.double() @ weight.double()
    gate, up = product.chunk(2, dim=1)
    total = residual.double() + product
    assert_close(linear_few(x, weight, tuning), product)
    assert_close(gate_up_silu_few(x, weight, tuning), functional.silu(gate) * up)
    assert linear_add_few(x, weight, residual, tuning) is residual
    assert_close(residual, total)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_default_tuning_and_rows_that_are_part_of_others(dtype: torch.dtype) -> None:
    whole, weight = random(3, 1024 + 16, dtype=dtype), random(80, 1024, dtype=dtype, seed=1).t()
    x = whole[:, 16:]
    assert_close(linear_few(x, weight), x.double() @ weight.double())


def test_parts_are_summed_anew_by_every_launch() -> None:
    """Arrivals are back at zero after each launch, and two launches agree to the bit."""
    tuning = LinearTuning(32, 32, 4, num_stages=3)
    x, weight = random(4, 256), random(96, 256, seed=1).t()
    first = linear_few(x, weight, tuning)
    linear_few(-x, weight, tuning)
    assert torch.equal(linear_few(x, weight, tuning), first)


def test_what_it_does_not_take() -> None:
    x, weight = random(4, 64), random(32, 64, seed=1).t()
    assert supports(x, weight)
    assert not supports(random(129, 64), weight)
    assert not supports(x, weight.contiguous())
    assert not supports(x.half(), weight)
    with pytest.raises(InternalError, match="strides"):
        linear_few(x, weight.contiguous())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_products_stay_with_cublas_where_they_were_not_measured() -> None:
    x, weight = (torch.empty(size, 4096, dtype=torch.bfloat16) for size in (8, 6144))
    assert (4096, 6144, False, 16) in TUNED
    assert not is_ahead(x, weight.t(), is_gated=False), "there is no GPU"
    assert all(padded_rows(rows) == rows for *_, rows in TUNED)
