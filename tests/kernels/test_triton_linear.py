"""The fused products for few rows against the reference's separate kernels."""

from __future__ import annotations

import pytest
import torch

from common.kernels import reference, triton_linear
from common.kernels.triton_linear import LinearTuning, Prefetch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TUNING = LinearTuning(16, 64, 4, 2)
NUM_INPUTS, NUM_OUTPUTS = 192, 64


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_rows", [1, 5, 17])
def test_a_product_with_its_bias(num_rows: int) -> None:
    x, weight, bias = drawn(num_rows, NUM_INPUTS), drawn(NUM_OUTPUTS, NUM_INPUTS), drawn(NUM_OUTPUTS)
    expected = x.double() @ weight.double().t() + bias
    assert relative_error(triton_linear.linear(x, weight, bias, TUNING), expected) < 1e-5


def test_gate_and_up_meet_in_one_kernel() -> None:
    x, weight = drawn(3, NUM_INPUTS), drawn(2 * NUM_OUTPUTS, NUM_INPUTS)
    expected = reference.silu_mul(x.double() @ weight.double().t())
    assert relative_error(triton_linear.linear_silu_mul(x, weight, TUNING), expected) < 1e-5


def test_the_residual_grows_by_the_product_whatever_is_fetched_ahead() -> None:
    x, weight, residual = drawn(4, NUM_INPUTS), drawn(NUM_OUTPUTS, NUM_INPUTS), drawn(4, NUM_OUTPUTS)
    expected = residual.double() + x.double() @ weight.double().t()
    triton_linear.linear_add(x, weight, residual, TUNING, Prefetch(drawn(100, 1024), 512))
    assert relative_error(residual, expected) < 1e-5
