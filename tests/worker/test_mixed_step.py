"""The layout of captured steps with chunks, and the kernel that starts them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels import triton_step
from common.kernels.triton_prefill import EMPTY_TILE
from common.worker.mixed_graphs import chunk_sizes, prompt_sizes, row_sizes
from common.worker.mixed_step import MAX_CHUNKS, MixedSize, blank, cut, fill, num_elements
from common.worker.step_plan import Segment, pack_tokens, unpack_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
SPARE_ROW = 31
BLOCK_SIZE, COLUMNS = 16, 24


@given(max_rows=st.integers(1, 2000))
def test_every_number_of_rows_fits(max_rows: int) -> None:
    sizes = row_sizes(max_rows)
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (0, max_rows)
    assert max(b - a for a, b in pairwise(sizes)) <= 128


@given(chunk_tokens=st.integers(1, 4096))
def test_every_number_of_tokens_fits_with_less_padding_than_tokens(chunk_tokens: int) -> None:
    sizes = chunk_sizes(chunk_tokens)
    assert list(sizes) == sorted(set(sizes))
    assert all(size % 64 == 0 for size in sizes)
    assert chunk_tokens <= sizes[-1] < chunk_tokens + 64
    assert all(size <= 2 * smaller for smaller, size in pairwise(sizes))


@pytest.mark.parametrize(("chunk_tokens", "expected"), [(64, (64,)), (100, (64, 128)), (512, (64, 128, 256, 512))])
def test_the_budget_is_captured_and_its_halves(chunk_tokens: int, expected: tuple[int, ...]) -> None:
    assert chunk_sizes(chunk_tokens) == expected


@given(prompt_tokens=st.integers(1, 4096))
def test_prompts_alone_are_padded_by_less_than_64_tokens(prompt_tokens: int) -> None:
    sizes = prompt_sizes(prompt_tokens)
    assert sizes == tuple(range(64, sizes[-1] + 1, 64))
    assert prompt_tokens <= sizes[-1] < prompt_tokens + 64


def make_segments(lengths: list[int], positions: list[int]) -> list[Segment]:
    """Every other chunk ends its prompt. Row 2 decodes nothing: it belongs to nobody."""
    return [
        Segment(3 + number, pack_tokens(range(7 * number, 7 * number + length)), position, [], number % 2 == 0, number)
        for number, (length, position) in enumerate(zip(lengths, positions, strict=False))
    ]


CHUNKS = st.lists(st.integers(1, 70), min_size=1, max_size=MAX_CHUNKS).filter(lambda lengths: sum(lengths) <= 128)
POSITIONS = st.lists(st.integers(0, 300), min_size=MAX_CHUNKS, max_size=MAX_CHUNKS)


@settings(max_examples=60)
@given(lengths=CHUNKS, positions=POSITIONS, queries=st.integers(4, 64), num_decoding=st.integers(0, 5))
def test_tiles_cover_each_token_once_and_padding_sees_only_the_start(
    lengths: list[int], positions: list[int], queries: int, num_decoding: int
) -> None:
    size = MixedSize(5, 128, queries)
    chunks = make_segments(lengths, positions)
    flat, fields = blank(size, SPARE_ROW)
    fill(fields, size, [Segment(20 + n, None, 9, [], True, n) for n in range(num_decoding)], chunks)
    assert flat.shape == (num_elements(size),)
    tokens: dict[int, tuple[int, int]] = {}
    for span, first, position, count in fields.tiles.tolist():
        assert count <= queries
        tokens |= {first + place: (span, position + place) for place in range(count)}
    assert sum(fields.tiles[:, 3]) == len(tokens) == size.num_tokens
    expected = [(number, c.position + place) for number, c in enumerate(chunks) for place in range(c.num_tokens)]
    assert [tokens[5 + place] for place in range(len(expected))] == expected
    assert all(tokens[5 + place][0] == 0 for place in range(len(expected), 128))
    assert all(tokens[5 + place][1] < queries for place in range(len(expected), 128))
    ends = np.cumsum(lengths) + 4
    samples = [(n, 20 + n, n) for n in range(num_decoding)]
    samples += [(int(ends[n]), 3 + n, n) for n in range(0, len(lengths), 2)]
    packed = list(zip(fields.places.tolist(), fields.rows.tolist(), fields.output_indices.tolist(), strict=True))
    assert packed[: len(samples)] == samples
    assert set(packed[len(samples) :]) == {(0, SPARE_ROW, 0)}


def test_the_device_sees_what_the_host_wrote_at_aligned_addresses() -> None:
    size = MixedSize(7, 64, 30)
    flat, fields = blank(size, SPARE_ROW)
    fill(fields, size, [Segment(1, None, 5, [], True, 2)], make_segments([10, 33], [0, 70]))
    on_device = torch.from_numpy(flat).to(DEVICE)
    views = cut(on_device, size)
    for name in ("decode", "chunks", "token_ids", "tiles", "places", "rows", "output_indices"):
        view = getattr(views, name)
        assert view.tolist() == getattr(fields, name).tolist()
        assert view.is_contiguous()
        assert (view.data_ptr() - on_device.data_ptr()) % 16 == 0
    assert views.tiles[-1].tolist() == list(EMPTY_TILE)


@settings(max_examples=10)
@given(lengths=CHUNKS, positions=POSITIONS, seed=st.integers(0, 9))
def test_chunks_find_their_tokens_positions_slots_and_tables(
    lengths: list[int], positions: list[int], seed: int
) -> None:
    size = MixedSize(5, 128, 32)
    chunks = make_segments(lengths, positions)
    flat, fields = blank(size, SPARE_ROW)
    fill(fields, size, [], chunks)
    generator = torch.Generator().manual_seed(seed)
    row_tables = torch.randint(1000, (SPARE_ROW + 1, COLUMNS), dtype=torch.int32, generator=generator)
    views = cut(torch.from_numpy(flat).to(DEVICE), size)
    # Contents of the step before, which must not stay where they are read.
    token_ids, places, slots = (torch.full((128,), 99, dtype=torch.int64, device=DEVICE) for _ in range(3))
    tables = torch.full((MAX_CHUNKS, COLUMNS), 5, dtype=torch.int32, device=DEVICE)
    triton_step.begin_chunks(
        views.chunks, views.token_ids, row_tables.to(DEVICE), BLOCK_SIZE, token_ids, places, slots, tables
    )
    at = [(chunk, chunk.position + place) for chunk in chunks for place in range(chunk.num_tokens)]
    padding = 128 - len(at)
    ids = [token for chunk in chunks for token in unpack_tokens(chunk.token_ids or b"")]
    assert token_ids.tolist() == ids + [0] * padding
    assert places.tolist() == [position for _, position in at] + [0] * padding
    assert (
        slots.tolist()
        == [
            int(row_tables[chunk.row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
            for chunk, position in at
        ]
        + [-1] * padding
    )
    for number, table in enumerate(tables.tolist()):
        num_blocks = 0
        if number < len(chunks):
            num_blocks = -(-(chunks[number].position + chunks[number].num_tokens) // BLOCK_SIZE)
            assert table[:num_blocks] == row_tables[chunks[number].row, :num_blocks].tolist()
        assert table[num_blocks:] == [5] * (COLUMNS - num_blocks)
