"""Which batch sizes are captured."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.worker.decode_graphs import batch_sizes


@settings(deadline=None, max_examples=100)
@given(max_rows=st.integers(1, 2000))
def test_every_batch_fits_with_less_padding_than_rows(max_rows: int) -> None:
    sizes = batch_sizes(max_rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == max_rows
    for smaller, size in zip((0, *sizes), sizes, strict=False):
        assert size - (smaller + 1) <= max(smaller, 1) or size <= 8


@pytest.mark.parametrize(("max_rows", "expected"), [(1, (1,)), (6, (1, 2, 4, 6)), (24, (1, 2, 4, 8, 16, 24))])
def test_no_size_beyond_the_rows_is_captured(max_rows: int, expected: tuple[int, ...]) -> None:
    assert batch_sizes(max_rows) == expected
