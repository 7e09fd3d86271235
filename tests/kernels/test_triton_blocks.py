"""Gather and scatter of KV blocks with the digest, against the reference: equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels import blocks_reference, triton_backend, triton_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


def random_kv(num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 2, num_kv_heads, block_size, head_dim, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim", "first_head", "num_heads"),
    [
        (torch.float32, 16, 32, 0, 4),
        (torch.bfloat16, 16, 32, 1, 2),
        (torch.float16, 16, 32, 3, 1),
        (torch.float32, 16, 32, 0, 3),
        (torch.bfloat16, 64, 128, 1, 2),
        (torch.bfloat16, 8, 48, 1, 3),
    ],
)
def test_payload_digest_and_blocks_equal_the_reference(
    dtype: torch.dtype, block_size: int, head_dim: int, first_head: int, num_heads: int
) -> None:
    kv = random_kv(4, block_size, head_dim, dtype)
    ids = torch.tensor([7, 0, 3, 8, 1], device=DEVICE)
    payload = torch.full((2, 5, 2, num_heads, block_size, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    expected = torch.empty_like(payload)
    digest = blocks_reference.gather_blocks(kv, ids, first_head, num_heads, expected)
    assert triton_backend.gather_blocks(kv, ids, first_head, num_heads, payload) == digest
    assert torch.equal(payload, expected)
    assert triton_backend.payload_digest(payload) == digest

    target, plain_target = torch.zeros_like(kv), torch.zeros_like(kv)
    blocks_reference.scatter_blocks(plain_target, ids, first_head, num_heads, payload)
    found = triton_backend.scatter_with_digest(target, ids, first_head, num_heads, payload)
    assert triton_backend.digest_value(found) == digest
    assert torch.equal(target, plain_target)


@settings(deadline=None, max_examples=8)
@given(num_words=st.integers(1, 40000), bit=st.integers(0, 63), seed=st.integers(0, 99))
def test_digest_equals_the_reference_and_sees_every_bit(num_words: int, bit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (num_words,), generator=generator).to(DEVICE)
    payload = words.view(torch.uint8)
    digest = triton_backend.payload_digest(payload)
    assert digest == blocks_reference.payload_digest(payload)
    words[seed % num_words] ^= 1 << bit if bit < 63 else -(1 << 63)
    assert triton_backend.payload_digest(payload) != digest


def test_an_empty_payload_has_digest_zero() -> None:
    kv = random_kv(2, 16, 32, torch.float32)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert triton_backend.gather_blocks(kv, none, 0, 2, torch.empty(2, 0, 2, 2, 16, 32, device=DEVICE)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_kernel_that_was_compiled_is_launched_past_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = random_kv(4, 16, 32, torch.bfloat16)
    triton_backend.gather_with_digest(kv, torch.tensor([7, 0], device=DEVICE), 0, 4, kv.new_empty(2, 2, 2, 4, 16, 32))
    ids = torch.tensor([3, 8, 1], device=DEVICE)
    payload, expected = (kv.new_zeros(2, 3, 2, 4, 16, 32) for _ in range(2))
    digest = blocks_reference.gather_blocks(kv, ids, 0, 4, expected)
    monkeypatch.setattr(triton_blocks, "_move_kernel", None)
    assert triton_backend.gather_blocks(kv, ids, 0, 4, payload) == digest
    assert torch.equal(payload, expected)
