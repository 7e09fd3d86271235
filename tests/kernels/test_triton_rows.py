"""Row kernels of the Triton backend, against the plain-torch reference."""

from __future__ import annotations

import pytest
import torch

from common.kernels import cuda_backend, reference, triton_backend, triton_rows
from common.kernels.batch import KVShape, Span
from common.kernels.scaled_rows import ScaledRows, finished

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [64, 100])
def test_rms_norm(num_columns: int, dtype: torch.dtype) -> None:
    x, weight = random(3, num_columns, dtype=dtype), random(num_columns, dtype=dtype, seed=1)
    assert_close(triton_backend.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_leaves_the_sum_in_the_residual(dtype: torch.dtype) -> None:
    x, residual, weight = (
        random(5, 96, dtype=dtype),
        random(5, 96, dtype=dtype, seed=1),
        random(96, dtype=dtype, seed=2),
    )
    total = x + residual
    out = triton_backend.add_rms_norm(x, residual, weight, 1e-5)
    assert_close(residual, total)
    assert_close(out, reference.rms_norm(total.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * 80, dtype=dtype)
    assert_close(triton_backend.silu_mul(gate_up), reference.silu_mul(gate_up.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_queries_are_rotated_and_keys_and_values_stored(with_norm: bool, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim, block_size = 6, 2, 32, 16
    spans = [Span(20, 37, [3, 1, 5]), Span(1, 17, [0, 4])]
    shape = KVShape(7, num_kv_heads, block_size, head_dim)
    qkv = random(21, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    cos, sin = (random(21, 1, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    q_norm, k_norm = (random(head_dim, dtype=dtype, seed=seed) if with_norm else None for seed in (3, 4))
    kv = random(7, 2, num_kv_heads, block_size, head_dim, dtype=dtype, seed=5)
    wide_kv = kv.double()
    wide_norms = (norm if norm is None else norm.double() for norm in (q_norm, k_norm))
    wide_q_norm, wide_k_norm = wide_norms
    expected = reference.qk_norm_rope_store(
        qkv.double(), num_heads, cos.double(), sin.double(), wide_q_norm, wide_k_norm, 1e-5, wide_kv,
        reference.plan_batch(spans, [None], shape, torch.float64, DEVICE),
    )  # fmt: skip
    untouched = kv.clone()
    plan = cuda_backend.plan_batch(spans, [None], shape, dtype, DEVICE)
    q = triton_backend.qk_norm_rope_store(qkv, num_heads, cos, sin, q_norm, k_norm, 1e-5, kv, plan)
    assert q.data_ptr() == qkv.data_ptr()
    assert_close(q, expected)
    assert_close(kv, wide_kv)
    assert torch.equal(kv[[2, 6]], untouched[[2, 6]])
    assert not plan.cleaned.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [64, 100])
def test_half_a_norm_is_finished(num_columns: int, dtype: torch.dtype) -> None:
    """Squares of padding rows are none of its business."""
    rows, weight = random(3, num_columns, dtype=dtype), random(num_columns, dtype=dtype, seed=1)
    wide = rows.double()
    squares = torch.full((5, 16), float("nan"), device=DEVICE)
    for part, columns in enumerate(wide.square().tensor_split(5, dim=1)):
        squares[part, :3] = columns.sum(1)
    values = rows.float() * weight.float()
    expected = reference.rms_norm(wide, weight.double(), 1e-5)
    made = ScaledRows(values.to(dtype), squares, 1e-5)
    assert_close(triton_rows.finished(made), expected)
    assert_close(finished(made), expected)
    assert triton_rows.finished(values) is values


def test_keys_and_values_that_are_not_finite_are_stored_as_zero() -> None:
    """As the reference does; Q keeps what it is, so that the sequence's token says so."""
    kv = random(2, 2, 1, 16, 32, dtype=torch.float32)
    plan = cuda_backend.plan_batch([Span(2, 20, [0, 1])], [None], KVShape(2, 1, 16, 32), torch.float32, DEVICE)
    angles = torch.ones(2, 1, 32, device=DEVICE)
    qkv = random(2, 3, 32, dtype=torch.float32, seed=1)
    qkv[0, :, 3] = float("nan")
    q = triton_backend.qk_norm_rope_store(qkv.clone(), 1, angles, angles, None, None, 1e-5, kv, plan)
    assert q[0].isnan().any()
    assert kv.isfinite().all()
    others = [dim for dim in range(32) if dim % 16 != 3]  # turned together with what is not finite
    assert torch.equal(kv[1, 1, 0, 2, others], qkv[0, 2, others])
    assert kv[1, 0, 0, 2, 3] == 0.0
    assert plan.cleaned.tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 70], ids=["one group of heads", "two groups"])
@pytest.mark.parametrize("is_value", [False, True])
def test_one_number_that_is_infinite_is_noted_for_its_token_alone(
    is_value: bool, num_heads: int, dtype: torch.dtype
) -> None:
    """Its query is sound, so nothing else would tell. What has no slot is not stored and so not cleaned."""
    kv = random(2, 2, 1, 16, 32, dtype=dtype)
    plan = cuda_backend.plan_batch([Span(4, 20, [0, 1])], [None], KVShape(2, 1, 16, 32), dtype, DEVICE)
    plan.store_slots[2] = -1
    ones, zeros = torch.ones(4, 1, 32, device=DEVICE, dtype=dtype), torch.zeros(4, 1, 32, device=DEVICE, dtype=dtype)
    qkv = random(4, num_heads + 2, 32, dtype=dtype, seed=1)
    qkv[1:3, num_heads + is_value, 19] = float("-inf")
    qkv[3, 0, 5] = float("inf")  # a query's
    triton_backend.qk_norm_rope_store(qkv, num_heads, ones, zeros, None, None, 1e-5, kv, plan)
    assert plan.cleaned.tolist() == [0, 1, 0, 0]
    assert kv.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_cleaned_tokens_are_spoiled_once(dtype: torch.dtype) -> None:
    rows = random(600, 40, dtype=dtype)
    before = rows.clone()
    cleaned = torch.zeros(600, dtype=torch.int32, device=DEVICE)
    cleaned[[0, 511, 512, 599]] = 1
    triton_rows.spoil_cleaned(rows, cleaned)
    assert rows[:, 0].isnan().nonzero().flatten().tolist() == [0, 511, 512, 599]
    assert torch.equal(rows[:, 1:], before[:, 1:])
    assert not cleaned.any()
    triton_rows.spoil_cleaned(before, cleaned)
    assert before.isfinite().all()


def test_tokens_without_a_slot_are_not_stored() -> None:
    shape = KVShape(2, 1, 16, 32)
    kv = random(2, 2, 1, 16, 32, dtype=torch.float32)
    before = kv.clone()
    plan = triton_backend.plan_decode(3, 1, [None], shape, torch.float32, DEVICE)
    angles = torch.ones(3, 1, 32, device=DEVICE)
    qkv = random(3, 4, 32, dtype=torch.float32, seed=1)
    triton_backend.qk_norm_rope_store(qkv, 2, angles, angles, None, None, 1e-5, kv, plan)
    assert torch.equal(kv, before)
