"""Attention of the Triton backend over KV blocks, against the plain-torch reference in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels import cuda_backend, reference, triton_backend, triton_decode, triton_prefill
from common.kernels.batch import KVShape, Span
from common.kernels.head_sizes import CUDA_HEAD_DIMS
from common.kernels.triton_device import num_multiprocessors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """A ragged batch with its cache; blocks are handed out in random order."""

    spans: list[Span]
    shape: KVShape
    q: torch.Tensor
    kv: torch.Tensor

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.shape.head_dim)

    def expected(self, window: int | None) -> torch.Tensor:
        plan = reference.plan_batch(self.spans, [window], self.shape, torch.float64, DEVICE)
        return reference.attention(self.q.double(), self.kv.double(), plan, window, self.scale)

    def plan(self, window: int | None) -> triton_backend.TritonPlan:
        return cuda_backend.plan_batch(self.spans, [window], self.shape, self.kv.dtype, DEVICE)

    def attend(self, window: int | None) -> torch.Tensor:
        return triton_backend.attention(self.q, self.kv, self.plan(window), window, self.scale)


def make_case(
    lengths: list[tuple[int, int]],
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """lengths: (num_queries, context_length) of each sequence. q is a view of a wider projection, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for _, context in lengths]
    ids = list(range(sum(counts) + 2))
    random.Random(seed).shuffle(ids)
    spans = [
        Span(queries, context, [ids.pop() for _ in range(count)])
        for (queries, context), count in zip(lengths, counts, strict=True)
    ]
    shape = KVShape(sum(counts) + 2, num_kv_heads, block_size, head_dim)
    size = (shape.num_blocks, 2, num_kv_heads, block_size, head_dim)
    qkv = torch.randn(sum(n for n, _ in lengths), num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    kv = torch.randn(size, generator=generator)
    return Case(spans, shape, qkv.to(DEVICE, dtype)[:, :num_heads], kv.to(DEVICE, dtype))


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(out.double() - expected) / torch.linalg.vector_norm(expected))


MIXED = [(1, 70), (20, 20), (1, 5), (7, 40), (1, 1), (33, 100)]


@pytest.mark.parametrize("window", [None, 33, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_reference_on_a_ragged_batch(dtype: torch.dtype, window: int | None) -> None:
    case = make_case(MIXED, dtype=dtype)
    assert relative_error(case.attend(window), case.expected(window)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (7, 1), (16, 1)])
def test_packs_any_number_of_grouped_heads(num_heads: int, num_kv_heads: int) -> None:
    case = make_case([(19, 40), (1, 37)], num_heads, num_kv_heads)
    assert relative_error(case.attend(None), case.expected(None)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("block_size", "head_dim"), [(16, 128), (32, 32), (32, 64), *((64, size) for size in CUDA_HEAD_DIMS)]
)
def test_takes_every_block_and_head_size(block_size: int, head_dim: int) -> None:
    case = make_case([(20, 90), (1, 130), (1, 64)], 4, 2, head_dim, block_size, torch.float16)
    assert relative_error(case.attend(None), case.expected(None)) < TOLERANCE[torch.float16]


@settings(deadline=None, max_examples=8)
@given(
    contexts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 320),
    seed=st.integers(0, 99),
)
def test_decode_shares_work_over_any_mix_of_lengths(contexts: list[int], window: int | None, seed: int) -> None:
    case = make_case([(1, context) for context in contexts], seed=seed)
    assert relative_error(case.attend(window), case.expected(window)) < TOLERANCE[torch.float32]


@settings(deadline=None, max_examples=6)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 60), st.integers(0, 100)), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_prefill_sees_prefix_and_own_chunk(lengths: list[tuple[int, int]], window: int | None, seed: int) -> None:
    case = make_case([(queries, prefix + queries) for queries, prefix in lengths], seed=seed)
    assert relative_error(case.attend(window), case.expected(window)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("tile", "programs", "min_tiles"), [(16, 1, 1), (16, 3, 4), (32, 1, 4), (32, 3, 1), (64, 3, 1)]
)
def test_decode_tuning_changes_no_result(tile: int, programs: int, min_tiles: int) -> None:
    case = make_case([(1, 300), (1, 20), (1, 17)])
    plan = case.plan(None)
    assert plan.decode is not None
    tuning = triton_decode.DecodeTuning(tile, programs, 4, 2, min_tiles, use_tma=tile == 16)
    triton_decode.refresh(plan.decode, case.shape.block_size, tile)
    out = torch.full((3, 8 * 32), float("nan"), device=DEVICE)
    triton_decode.decode_attention(case.q, case.kv, plan.decode, None, case.scale, out, tuning)
    assert relative_error(out, case.expected(None)) < TOLERANCE[torch.float32]


def share_tuning(num_programs: int, use_tma: bool = False) -> triton_decode.DecodeTuning:
    """At least so many programs, one tile each if there are no more tiles. One warp merges few parts in one go."""
    per_multiprocessor = -(-num_programs // num_multiprocessors(DEVICE))
    return triton_decode.DecodeTuning(16, per_multiprocessor, 1, 2, min_tiles=1, use_tma=use_tma)


def decode_twice(
    case: Case, window: int | None, tuning: triton_decode.DecodeTuning, num_padding: int = 0
) -> torch.Tensor:
    """Of the case's rows, with padding rows after them; a launch must leave nothing that changes the next one."""
    num_rows = len(case.spans)
    columns = max(len(span.block_ids) for span in case.spans) + 1
    plan = triton_backend.plan_decode(num_rows + num_padding, columns, [window], case.shape, case.kv.dtype, DEVICE)
    assert plan.decode is not None
    for row, span in enumerate(case.spans):
        plan.decode.block_tables[row, : len(span.block_ids)] = torch.tensor(span.block_ids)
        plan.decode.context_lengths[row] = span.context_length
    triton_decode.refresh(plan.decode, case.shape.block_size, tuning.tile)
    q = torch.cat([case.q, case.q[:1].expand(num_padding, -1, -1)])
    first, second = (torch.full(q.flatten(1).shape, float("nan"), dtype=q.dtype, device=DEVICE) for _ in range(2))
    for out in (first, second):
        triton_decode.decode_attention(q, case.kv, plan.decode, window, case.scale, out, tuning)
        for space in triton_decode._WORKSPACES.values():
            assert not space.arrivals.any()
            assert not space.group_arrivals.any()
    assert torch.equal(first, second)
    assert torch.equal(first[num_rows:], torch.zeros_like(first[num_rows:]))
    return first[:num_rows]


@pytest.mark.parametrize(
    ("group", "head_dim", "merged", "parts"),
    [
        *((4, 128, 4, parts) for parts in (3, 4, 5, 8, 9, 16, 17, 35)),  # up to three turns of the last level
        *((7, 64, 4, parts) for parts in (4, 5, 17)),
        *((7, 128, 2, parts) for parts in (2, 3, 5, 9)),
        *((1, 128, 16, parts) for parts in (16, 17, 33)),
        (16, 128, 1, 3),
    ],
)
def test_a_row_of_many_parts_is_merged_in_two_levels(group: int, head_dim: int, merged: int, parts: int) -> None:
    assert triton_decode.num_merged(group, head_dim, num_warps=1) == merged
    case = make_case([(1, 16 * parts - 3)], group, 1, head_dim)
    out = decode_twice(case, None, share_tuning(parts))
    assert relative_error(out, case.expected(None)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("window", "use_tma"), [(None, False), (None, True), (150, False), (7, False)])
def test_rows_of_few_and_many_parts_and_padding_share_programs(window: int | None, use_tma: bool) -> None:
    """4 parts are merged in one go: the long rows have more, with ends within programs of their neighbours."""
    case = make_case([(1, 260), (1, 33), (1, 1), (1, 90)], 8, 2, 128)
    out = decode_twice(case, window, share_tuning(28, use_tma), num_padding=2)
    assert relative_error(out, case.expected(window)) < TOLERANCE[torch.float32]


@settings(deadline=None, max_examples=6)
@given(
    contexts=st.lists(st.integers(1, 350), min_size=1, max_size=3),
    num_programs=st.integers(1, 40),
    group=st.sampled_from([1, 4, 7]),
    window=st.none() | st.integers(1, 600),
)
def test_any_shares_are_merged_alike(contexts: list[int], num_programs: int, group: int, window: int | None) -> None:
    case = make_case([(1, context) for context in contexts], 2 * group, 2, 128)
    out = decode_twice(case, window, share_tuning(num_programs), num_padding=1)
    assert relative_error(out, case.expected(window)) < TOLERANCE[torch.float32]


def test_the_workspace_has_a_counter_for_every_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when few programs with long rows were first."""
    monkeypatch.setattr(triton_decode, "_WORKSPACES", {})
    few = triton_decode._workspace(DEVICE, 0, num_programs=4, row_elements=4096, num_rows=1)
    many = triton_decode._workspace(DEVICE, 0, num_programs=400, row_elements=32, num_rows=1)
    assert few.group_arrivals.numel() >= 2 * 4
    assert many.group_arrivals.numel() >= 2 * 400
    assert triton_decode._workspace(DEVICE, 0, num_programs=4, row_elements=32, num_rows=1) is many


@pytest.mark.parametrize(("use_tma", "heads_outermost"), [(False, True), (True, False)])
def test_prefill_tuning_changes_no_result(use_tma: bool, heads_outermost: bool) -> None:
    case = make_case([(50, 90), (3, 3)])
    plan = case.plan(None)
    assert plan.prefill is not None
    tuning = triton_prefill.PrefillTuning(64, 16 if use_tma else 32, 4, 2, use_tma, heads_outermost)
    out = torch.full((53, 8 * 32), float("nan"), device=DEVICE)
    triton_prefill.prefill_attention(case.q, case.kv, plan.prefill, None, case.scale, out, tuning)
    assert relative_error(out, case.expected(None)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [None, 1, 20])
def test_empty_tiles_change_nothing(window: int | None) -> None:
    """As in a captured step whose table of tiles has more places than there are tiles."""
    case = make_case([(20, 90), (3, 3)])
    plan = case.plan(window)
    assert plan.prefill is not None
    out, expected = (torch.full((23, 8 * 32), float("nan"), device=DEVICE) for _ in range(2))
    triton_prefill.prefill_attention(case.q, case.kv, plan.prefill, window, case.scale, expected)
    queries = triton_prefill.tile_queries(8, case.kv)
    tiles = plan.prefill.tiles(queries)
    empty = torch.tensor([triton_prefill.EMPTY_TILE] * 3, dtype=torch.int32, device=DEVICE)
    plan.prefill._tiles[queries] = torch.cat((empty, tiles, empty))
    triton_prefill.prefill_attention(case.q, case.kv, plan.prefill, window, case.scale, out)
    assert torch.equal(out, expected)
    plan.prefill._tiles[queries] = empty
    triton_prefill.prefill_attention(case.q, case.kv, plan.prefill, window, case.scale, out.fill_(7.0))
    assert torch.equal(out, torch.full_like(out, 7.0))


def test_tiles_cover_every_query_once_and_start_with_the_most_keys() -> None:
    case = make_case([(50, 90), (3, 300), (17, 17)])
    spans = tuple(zip((0, 50, 53), case.spans, strict=True))
    tiles = triton_prefill.make_tiles(spans, 8)
    assert sorted(row for _, first, _, count in tiles for row in range(first, first + count)) == list(range(70))
    assert [position for _, _, position, _ in tiles] == sorted((tile[2] for tile in tiles), reverse=True)


def test_a_decode_plan_is_refilled_in_place() -> None:
    """As between two replays of a captured graph: other sequences, other lengths, padding rows."""
    case = make_case([(1, 70), (1, 33), (1, 200)])
    plan = triton_backend.plan_decode(5, 16, [None, 40], case.shape, torch.float32, DEVICE)
    assert plan.decode is not None
    for order in ([0, 1, 2], [2, 0]):
        tables = torch.zeros(5, 16, dtype=torch.int32)
        lengths = torch.zeros(5, dtype=torch.int32)
        for row, index in enumerate(order):
            span = case.spans[index]
            tables[row, : len(span.block_ids)] = torch.tensor(span.block_ids)
            lengths[row] = span.context_length
        plan.decode.block_tables.copy_(tables)
        plan.decode.context_lengths.copy_(lengths)
        triton_backend.refresh_decode(plan)
        q = torch.zeros(5, 8, 32, device=DEVICE)
        q[: len(order)] = case.q[order]
        for window in (None, 40):
            out = triton_backend.attention(q, case.kv, plan, window, case.scale)
            assert relative_error(out[: len(order)], case.expected(window)[order]) < TOLERANCE[torch.float32]
            assert torch.equal(out[len(order) :], torch.zeros_like(out[len(order) :]))
        last = [(case.spans[i].context_length - 1) for i in order]
        slots = [case.spans[i].block_ids[at // 16] * 16 + at % 16 for i, at in zip(order, last, strict=True)]
        assert plan.store_slots.tolist() == slots + [-1] * (5 - len(order))
