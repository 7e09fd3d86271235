"""The reference kernels against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

from common.kernels import reference
from common.kernels.backend import kernels_for
from common.kernels.batch import KVShape, Span

CPU = torch.device("cpu")
EPS = 1e-5


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = x.double()
    scaled = exact / (exact.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()
    return scaled.float()


def test_the_cpu_is_served_by_the_reference() -> None:
    assert kernels_for(CPU) is reference


def test_rms_norm_scales_to_unit_mean_square() -> None:
    x, weight = noise(3, 16), noise(16, seed=1)
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), plain_norm(x, weight))


def test_add_rms_norm_leaves_the_sum_in_the_residual() -> None:
    x, residual, weight = noise(3, 16), noise(3, 16, seed=1), noise(16, seed=2)
    total = x + residual
    torch.testing.assert_close(reference.add_rms_norm(x, residual, weight, EPS), plain_norm(total, weight))
    assert torch.equal(residual, total)


def test_silu_mul_gates_the_second_half() -> None:
    gate_up = noise(3, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(reference.silu_mul(gate_up), gate * gate.sigmoid() * up)


def test_linear_takes_the_weight_as_it_was_laid_out() -> None:
    x, weight, bias = noise(3, 4), noise(5, 4, seed=1), noise(5, seed=2)
    laid_out = reference.layout_weight(weight)
    torch.testing.assert_close(reference.linear(x, laid_out, bias), x @ weight.t() + bias)
    torch.testing.assert_close(reference.linear(x, laid_out, None), x @ weight.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_of_which_zeros_were_stored_spoil_their_rows_once(dtype: torch.dtype) -> None:
    """Whether K or V, and in whichever layer. A sum that overflows although all is finite spoils nothing."""
    plan = reference.plan_batch([Span(4, 6, [1, 0])], [None], KVShape(2, 1, 4, 6), dtype, CPU)
    kv_layer, angles = torch.zeros(2, 2, 1, 4, 6, dtype=dtype), torch.ones(4, 1, 6, dtype=dtype)
    largest = torch.finfo(dtype).max
    for token, head, number in ((1, 1, float("inf")), (3, 2, float("nan")), (0, 2, largest)):
        qkv = torch.ones(4, 3, 6, dtype=dtype)
        qkv[token, head] = number
        qkv[2, 0] = float("nan")  # a query's, which is stored nowhere
        reference.qk_norm_rope_store(qkv, 1, angles, torch.zeros_like(angles), None, None, EPS, kv_layer, plan)
        assert kv_layer.isfinite().all()
    rows = noise(4, 5).to(dtype)
    reference.spoil_cleaned(rows, plan)
    assert rows.isnan().nonzero().tolist() == [[1, 0], [3, 0]]
    again = noise(4, 5).to(dtype)
    reference.spoil_cleaned(again, plan)
    assert again.isfinite().all()


def test_q_and_k_are_normalised_and_rotated_and_k_and_v_stored() -> None:
    num_heads, num_kv_heads, dim, block_size = 4, 2, 6, 4
    kv_layer = torch.zeros(5, 2, num_kv_heads, block_size, dim)
    spans = [Span(1, 6, [3, 1]), Span(2, 5, [0, 4])]  # positions 5, then 3 and 4
    plan = reference.plan_batch(spans, [None], KVShape(5, num_kv_heads, block_size, dim), torch.float32, CPU)
    qkv = noise(3, num_heads + 2 * num_kv_heads, dim)
    q_norm, k_norm = noise(dim, seed=1), noise(dim, seed=2)
    angles = noise(3, dim // 2, seed=3)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1).unsqueeze(1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).unsqueeze(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        """As complex numbers: the first half is real, the second imaginary."""
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(3, 1, dim // 2), angles.unsqueeze(1))
        return torch.cat((turned.real, turned.imag), dim=-1)

    expected_q = rotated(plain_norm(qkv[:, :num_heads], q_norm))
    expected_k = rotated(plain_norm(qkv[:, num_heads : num_heads + num_kv_heads], k_norm))
    expected_v = qkv[:, num_heads + num_kv_heads :].clone()
    q = reference.qk_norm_rope_store(qkv, num_heads, cos, sin, q_norm, k_norm, EPS, kv_layer, plan)
    torch.testing.assert_close(q, expected_q)
    for token, (block, at) in enumerate([(1, 1), (0, 3), (4, 0)]):
        torch.testing.assert_close(kv_layer[block, 0, :, at], expected_k[token])
        assert torch.equal(kv_layer[block, 1, :, at], expected_v[token])
        kv_layer[block, :, :, at] = 0.0
    assert not kv_layer.any()
