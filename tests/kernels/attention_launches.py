"""Launches of attention in the shapes of an 8B model, for `test_triton_compile`.

Kernels are imported by what launches them: importing them decides whether they are interpreted or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch


def attention_launches(head_dim: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    from common.kernels import cuda_backend, triton_backend, triton_decode, triton_prefill, triton_prefill_hopper
    from common.kernels.batch import KVShape, Span

    num_heads, num_kv_heads, block_size = 32, 8, 64
    shape = KVShape(8, num_kv_heads, block_size, head_dim)
    kv = torch.empty(8, 2, num_kv_heads, block_size, head_dim, dtype=dtype)
    qkv = torch.empty(33, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    q = qkv[:, :num_heads]
    out = torch.empty(33, num_heads * head_dim, dtype=dtype)
    angles = torch.empty(33, 1, head_dim, dtype=dtype)
    norm = torch.empty(head_dim, dtype=dtype)
    spans = [Span(32, 32, [1]), Span(1, 100, [2, 3])]
    plan = cuda_backend.plan_batch(spans, [None, 50], shape, dtype, torch.device("cpu"))
    prefill, decode = plan.prefill, plan.decode
    assert prefill is not None
    assert decode is not None
    for norms in ((None, None), (norm, norm)):
        yield partial(
            triton_backend.qk_norm_rope_store, qkv, num_heads, angles, angles, norms[0], norms[1], 1e-5, kv, plan
        )
    for window in (None, 50):
        yield partial(triton_prefill_hopper.prefill_attention, q, kv, prefill, window, 0.1, out)
        yield partial(triton_prefill.prefill_attention, q, kv, prefill, window, 0.1, out)
        yield partial(triton_decode.decode_attention, q, kv, decode, window, 0.1, out)


def decode_launches(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Decode attention on Hopper, as in steps of few and of many sequences."""
    from common.kernels import dependent_launch, triton_backend, triton_decode
    from common.kernels.batch import KVShape

    num_heads, num_kv_heads, block_size = 32, 8, 64

    def launch(head_dim: int, num_sequences: int, window: int | None) -> None:
        shape = KVShape(8, num_kv_heads, block_size, head_dim)
        plan = triton_backend.plan_decode(num_sequences, 16, [window], shape, dtype, torch.device("cpu"))
        assert plan.decode is not None
        q = torch.empty(num_sequences, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)[:, :num_heads]
        kv = torch.empty(8, 2, num_kv_heads, block_size, head_dim, dtype=dtype)
        out = torch.empty(num_sequences, num_heads * head_dim, dtype=dtype)
        with mock.patch.object(dependent_launch, "is_hopper", return_value=True):
            triton_decode.decode_attention(q, kv, plan.decode, window, 0.1, out, plan.decode_tuning)

    for head_dim in (128, 64):
        for num_sequences in (1, 8, 64, 256):
            yield partial(launch, head_dim, num_sequences, 50 if num_sequences == 8 else None)
