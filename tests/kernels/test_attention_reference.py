"""Attention over blocks against a softmax written out per query."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels import attention_reference
from common.kernels.attention_reference import attention, plan_batch
from common.kernels.batch import KVShape, Span

HEAD_DIM, BLOCK_SIZE = 8, 4
CPU = torch.device("cpu")


def plain_attention(
    q: torch.Tensor, kv_layer: torch.Tensor, spans: list[Span], window: int | None, scale: float
) -> torch.Tensor:
    """One query and one head at a time. Shapes as in `attention`."""
    outputs: list[torch.Tensor] = []
    group = q.shape[1] // kv_layer.shape[2]
    for span in spans:
        for query in range(span.num_queries):
            position = span.context_length - span.num_queries + query
            first = 0 if window is None else max(0, position - window + 1)
            places = [(span.block_ids[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(first, position + 1)]
            for head in range(q.shape[1]):
                keys = torch.stack([kv_layer[block, 0, head // group, at] for block, at in places])
                values = torch.stack([kv_layer[block, 1, head // group, at] for block, at in places])
                weights = (keys @ q[len(outputs) // q.shape[1], head] * scale).softmax(dim=0)
                outputs.append(weights @ values)
    return torch.stack(outputs).view(q.shape[0], -1)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    num_kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 3, 7]),
    piece_elements=st.sampled_from([1, 500, 1 << 19]),
    seed=st.integers(0, 1000),
)
def test_every_query_sees_its_own_past_through_its_block_table(
    lengths: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    window: int | None,
    piece_elements: int,
    seed: int,
) -> None:
    counts = [-(-(queries + past) // BLOCK_SIZE) for queries, past in lengths]
    block_ids = list(range(sum(counts)))
    random.Random(seed).shuffle(block_ids)
    tables = [[block_ids.pop() for _ in range(count)] for count in counts]
    spans = [Span(queries, queries + past, table) for (queries, past), table in zip(lengths, tables, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    kv_layer = torch.randn((sum(counts), 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM), generator=generator)
    num_tokens = sum(queries for queries, _ in lengths)
    q = torch.randn((num_tokens, num_kv_heads * group, HEAD_DIM), generator=generator)
    shape = KVShape(sum(counts), num_kv_heads, BLOCK_SIZE, HEAD_DIM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_reference, "_PIECE_ELEMENTS", piece_elements)
        plan = plan_batch(spans, [window], shape, torch.float32, CPU)
    actual = attention(q, kv_layer, plan, window, 0.4)
    torch.testing.assert_close(actual, plain_attention(q, kv_layer, spans, window, 0.4), atol=1e-5, rtol=1e-5)


def test_blocks_before_the_window_are_not_even_read() -> None:
    shape = KVShape(6, 1, BLOCK_SIZE, HEAD_DIM)
    kv_layer = torch.randn((6, 2, 1, BLOCK_SIZE, HEAD_DIM), generator=torch.Generator().manual_seed(1))
    kv_layer[[0, 1, 2]] = float("nan")
    spans = [Span(1, 20, [0, 1, 2, 3, 4]), Span(4, 20, [0, 1, 2, 5, 4])]
    plan = plan_batch(spans, [4], shape, torch.float32, CPU)
    assert attention(torch.ones(5, 2, HEAD_DIM), kv_layer, plan, 4, 1.0).isfinite().all()
