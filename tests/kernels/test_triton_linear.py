"""Products with few rows of the Triton backend, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from common.errors import InternalError
from common.kernels import reference
from common.kernels.batch import KVShape, Span
from common.kernels.linear_tuning import TUNED, Kind, LinearTuning, padded_rows
from common.kernels.scaled_rows import NormedRows, ScaledRows, finished
from common.kernels.triton_linear import (
    gate_up_silu_few,
    is_ahead,
    linear_add_scale_few,
    linear_few,
    qkv_rope_store_few,
    supports,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
# [T, in, out]: one row, ragged rows, inputs and outputs that fill no tile, all rows
SIZES = [(1, 64, 48), (5, 136, 72), (17, 256, 128), (64, 96, 40), (128, 96, 40)]
EPS = 1e-5
TUNINGS = [
    LinearTuning(32, 32, split, num_stages=3, swap=swap, use_tma=use_tma)
    for split, swap, use_tma in itertools.product((1, 2, 3), (False, True), (False, True))
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def no_tokens(num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens, dtype=torch.int32, device=DEVICE)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tuning_gives_the_product_and_silu(size: tuple[int, int, int], tuning: LinearTuning) -> None:
    rows, num_in, num_out = size
    x, weight = random(rows, num_in), random(2 * num_out, num_in, seed=1).t()
    product = x.double() @ weight.double()
    gate, up = product.chunk(2, dim=1)
    assert_close(linear_few(x, weight, tuning), product)
    assert_close(gate_up_silu_few(x, weight, tuning), functional.silu(gate) * up)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_norm_divided_between_two_products_is_the_norm(size: tuple[int, int, int], tuning: LinearTuning) -> None:
    rows, num_in, num_out = size
    x, weight = random(rows, num_in), random(num_out, num_in, seed=1).t()
    residual, norm = 3 * random(rows, num_out, seed=2), random(num_out, seed=3)
    total = residual.double() + x.double() @ weight.double()
    expected = functional.rms_norm(total, (num_out,), norm.double(), EPS)
    made = linear_add_scale_few(x, weight, residual, norm, EPS, tuning)
    assert_close(residual, total)
    assert_close(finished(made), expected)
    following = random(96, num_out, seed=4).t()
    gate, up = (expected @ following.double()).chunk(2, dim=1)
    assert_close(gate_up_silu_few(made, following, tuning), functional.silu(gate) * up)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_are_rotated_and_keys_and_values_stored(rows: int, tuning: LinearTuning, normed: bool) -> None:
    """A token that has no slot leaves no trace; blocks of others stay as they were."""
    heads, kv_heads, block_size, head_dim, num_in = 3, 2, 16, 64, 136
    shape = KVShape(7, kv_heads, block_size, head_dim)
    spans = [Span(rows, 20 + rows, [3, 1, 5])]
    plan = reference.plan_batch(spans, [None], shape, torch.float64, torch.device("cpu"))
    slots = torch.tensor([[3, 1, 5][token // 16] * 16 + token % 16 for token in range(20, 20 + rows)], device=DEVICE)
    slots[3:4] = -1
    x: NormedRows = random(rows, num_in)
    if normed:
        x = ScaledRows(random(rows, num_in), random(3, padded_rows(rows), seed=6).abs(), EPS)
    weight = random((heads + 2 * kv_heads) * head_dim, num_in, seed=1).t()
    cos, sin = (random(rows, 1, head_dim, seed=seed) for seed in (2, 3))
    kv = random(7, 2, kv_heads, block_size, head_dim, seed=4)
    expected_kv, before = kv.double().cpu(), kv.clone()
    cleaned = no_tokens(rows)
    q = qkv_rope_store_few(x, weight, heads, cos, sin, kv, slots, cleaned, tuning)
    wide = [value.double().cpu() for value in (finished(x), weight, cos, sin)]
    expected = reference.qkv_rope_store(
        wide[0], wide[1], None, heads, wide[2], wide[3], None, None, EPS, expected_kv, plan
    )
    if rows > 3:
        expected_kv[1, :, :, 23 - 16] = before[1, :, :, 23 - 16].double().cpu()
    assert_close(q.cpu(), expected)
    assert_close(kv.cpu(), expected_kv)
    touched = torch.zeros(7 * block_size, dtype=torch.bool)
    touched[slots[slots >= 0].cpu()] = True
    same = (kv == before).all(-1).all(1).all(1).view(-1).cpu()  # of a token: all its keys and values
    assert torch.equal(same, ~touched)
    assert not cleaned.any()


def test_squares_of_other_rows_are_refused() -> None:
    rows = ScaledRows(random(5, 64), random(3, 5), EPS)
    with pytest.raises(InternalError, match="16 rows"):
        gate_up_silu_few(rows, random(32, 64, seed=1).t(), TUNINGS[0])


def test_keys_and_values_that_are_not_finite_are_stored_as_zero() -> None:
    """As those of the reference; Q keeps what it is, so that the sequence's token says so."""
    kv = random(2, 2, 1, 16, 64, seed=4)
    x, weight = random(2, 64), random(3 * 64, 64, seed=1).t()
    x[0, 5] = float("nan")
    slots, cleaned = torch.tensor([3, 20], device=DEVICE), no_tokens(2)
    angles = random(2, 1, 64, seed=2)
    q = qkv_rope_store_few(x, weight, 1, angles, angles, kv, slots, cleaned, TUNINGS[0])
    assert q[0].isnan().all()
    assert q[1].isfinite().all()
    assert torch.equal(kv[0, :, :, 3], torch.zeros(2, 1, 64, device=DEVICE))
    assert kv.isfinite().all()
    assert kv[1, :, :, 4].all()
    assert cleaned.tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("column", [64 + 3, 2 * 64 + 40], ids=["key", "value"])
def test_one_number_that_overflows_is_noted_for_its_token_alone(column: int, tuning: LinearTuning) -> None:
    """Its query is sound, so nothing else would tell. What has no slot is not stored and so not cleaned."""
    kv = random(2, 2, 1, 16, 64, seed=4)
    x, weight = random(20, 64), random(3 * 64, 64, seed=1).t()
    weight[7] = 0.0
    weight[7, column] = 10.0
    x[[2, 5, 18], 7] = torch.tensor([1e38, -1e38, 1e38], device=DEVICE)
    slots, cleaned = torch.arange(20, device=DEVICE), no_tokens(20)
    slots[5] = -1
    ones, zeros = torch.ones(20, 1, 64, device=DEVICE), torch.zeros(20, 1, 64, device=DEVICE)
    q = qkv_rope_store_few(x, weight, 1, ones, zeros, kv, slots, cleaned, tuning)
    assert cleaned.nonzero().flatten().tolist() == [2, 18]
    assert q.isfinite().all()
    assert kv.isfinite().all()
    num_turned = 2 if column < 2 * 64 else 1  # a key's number is turned together with another
    assert int((kv == 0.0).sum()) == 2 * num_turned


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("head", [32, 47], ids=["key", "value"])
def test_products_of_an_8b_model_note_one_number_that_overflows(head: int, rows: int) -> None:
    """As they are tuned, where that is measured: launched dependently, in bfloat16."""
    x = random(rows, 4096, dtype=torch.bfloat16)
    weight = (random(6144, 4096, seed=1) * 0.02).to(torch.bfloat16).t()
    weight[7] = 0.0
    weight[7, head * 128 + 99] = 1e38
    x[:, 7] = 0.0
    x[rows // 2, 7] = -1e3
    kv = random(2, 2, 8, 64, 128, dtype=torch.bfloat16)
    slots, cleaned = torch.arange(rows, device=DEVICE), no_tokens(rows)
    angles = random(rows, 1, 128, dtype=torch.bfloat16, seed=2)
    for _ in range(2):
        q = qkv_rope_store_few(x, weight, 32, angles, angles, kv, slots, cleaned)
        assert cleaned.nonzero().flatten().tolist() == [rows // 2]
        assert q.isfinite().all()
        assert kv.isfinite().all()
        cleaned.zero_()


def test_a_tile_must_be_part_of_half_a_head() -> None:
    kv, weight = random(2, 2, 1, 16, 32), random(3 * 32, 64, seed=1).t()
    angles, slots, cleaned = random(1, 1, 32), torch.zeros(1, dtype=torch.int64, device=DEVICE), no_tokens(1)
    with pytest.raises(InternalError, match="half a head of 32"):
        qkv_rope_store_few(random(1, 64), weight, 1, angles, angles, kv, slots, cleaned, TUNINGS[0])


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
    assert (4096, 6144, Kind.PLAIN, 16) in TUNED
    assert not is_ahead(x, weight.t(), Kind.PLAIN), "there is no GPU"
    assert all(padded_rows(rows) == rows for *_, rows in TUNED)
