"""Cells of worker tables: bars that are true to the counts, rates and latencies that can be read."""

from __future__ import annotations

import pytest
from baton.v1 import worker_pb2
from hypothesis import given
from hypothesis import strategies as st

from cli.worker_cells import block_bar, bytes_per_s, latency, name_of, shares, slots_of, state_of


@given(st.lists(st.integers(0, 10_000), min_size=3, max_size=3), st.integers(3, 80))
def test_shares_fill_the_width_and_hide_nothing(counts: list[int], width: int) -> None:
    cells = shares(counts, width)
    assert sum(cells) == (width if sum(counts) else 0)
    assert all((cell > 0) == (count > 0) for cell, count in zip(cells, counts, strict=True))


def test_a_bar_shows_held_then_cached_then_free() -> None:
    status = worker_pb2.WorkerStatus(num_blocks_held=50, num_blocks_cached=25, num_blocks_free=25)
    assert block_bar(status, width=8) == "████▒▒··"
    status = worker_pb2.WorkerStatus(num_blocks_held=1, num_blocks_free=10_000)
    assert block_bar(status, width=8) == "█·······"


@pytest.mark.parametrize(
    ("rate", "shown"), [(0, "0 B/s"), (999, "999 B/s"), (52_340_000, "52.3 MB/s"), (4.7e10, "47 GB/s"), (None, "–")]
)
def test_rates_have_three_digits(rate: float | None, shown: str) -> None:
    assert bytes_per_s(rate) == shown


def test_latencies_have_three_digits() -> None:
    assert [latency(value) for value in (0.01234, 0.9996, 2.4712, None)] == ["12.3 ms", "1 s", "2.47 s", "–"]


def test_names_are_those_of_the_proto() -> None:
    draining, decode = worker_pb2.WORKER_STATE_DRAINING, worker_pb2.WORKER_ROLE_DECODE
    status = worker_pb2.WorkerStatus(worker_id="x", role=decode, state=draining)
    assert (name_of(status), state_of(status)) == ("decode x", "draining")
    assert name_of(worker_pb2.WorkerStatus(worker_id="decode-0", role=decode)) == "decode-0"
    status = worker_pb2.WorkerStatus(num_slots_free=3, num_slots_in_use=2, num_slots_quarantined=1)
    assert slots_of(status) == "3/2/1"
