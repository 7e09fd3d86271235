"""The tables of workers in a terminal: whole at 80 columns, folded below, and cut nowhere."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from baton.v1 import worker_pb2
from rich.console import Console, RenderableType

from cli.status_view import StatusView
from cli.top_view import TopView

LARGE = worker_pb2.WorkerStatus(
    worker_id="prefill-123",
    role=worker_pb2.WORKER_ROLE_PREFILL,
    state=worker_pb2.WORKER_STATE_DRAINING,
    tp_size=8,
    num_waiting=1234,
    num_running=512,
    num_blocks_free=12345,
    num_blocks_cached=10000,
    num_blocks_held=9999,
    num_slots_free=8,
    num_slots_in_use=16,
    num_slots_quarantined=10,
)
CELLS = ("prefill-123", "draining", "1234", "512", "12345/10000/9999", "8/16/10")


def up_view() -> StatusView:
    view = StatusView()
    view.set_status("prefill-123", LARGE, num_restarts=3)
    view.set_status("decode-45", None, num_restarts=77)
    view.add_event("decode-45 [bold] ended with status 1")
    return view


def top_view() -> TopView:
    view = TopView(["127.0.0.1:50061", "127.0.0.1:50071"])
    view.set_status("127.0.0.1:50061", LARGE)
    view.set_router_error("no metrics from http://[::1]:9/metrics")
    return view


def drawn(view: RenderableType, width: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, markup=False).print(view)
    return output.getvalue().splitlines()


@pytest.mark.parametrize("view", [up_view, top_view])
def test_eighty_columns_show_every_name_and_value(view: Callable[[], RenderableType]) -> None:
    lines = drawn(view(), 80)
    (row,) = [line for line in lines if "prefill-123" in line]
    assert all(cell in row for cell in CELLS)
    assert any("unreachable" in line for line in lines)


def test_headings_events_and_restarts_are_whole_as_well() -> None:
    lines = drawn(up_view(), 80)
    assert lines[0].split() == ["worker", "state", "TP", "waiting", "running", "blocks", "slots", "restarts"]
    assert "77" in next(line for line in lines if line.startswith("decode-45"))
    assert "blocks: free/cached/held   slots: free/used/quarantined" in lines
    assert lines[-1].endswith("decode-45 [bold] ended with status 1")


def test_an_address_that_looks_like_markup_is_text() -> None:
    assert "router: no metrics from http://[::1]:9/metrics" in drawn(top_view(), 100)


@pytest.mark.parametrize("view", [up_view, top_view])
def test_a_narrow_terminal_folds_cells_and_cuts_none(view: Callable[[], RenderableType]) -> None:
    lines = drawn(view(), 50)
    assert not any("…" in line for line in lines)
    assert all(len(line) <= 50 for line in lines)
