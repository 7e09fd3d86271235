"""What tables of workers show in their cells, as text. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.v1 import worker_pb2

_BAR = "█▒·"  # held, cached, free


def state_of(status: worker_pb2.WorkerStatus) -> str:
    return worker_pb2.WorkerState.Name(status.state).removeprefix("WORKER_STATE_").lower()


def name_of(status: worker_pb2.WorkerStatus) -> str:
    """The worker's name, and its role unless the name says that."""
    role = worker_pb2.WorkerRole.Name(status.role).removeprefix("WORKER_ROLE_").lower()
    return status.worker_id if status.worker_id.startswith(role) else f"{role} {status.worker_id}"


def blocks_of(status: worker_pb2.WorkerStatus) -> str:
    """free/cached/held"""
    return f"{status.num_blocks_free}/{status.num_blocks_cached}/{status.num_blocks_held}"


def slots_of(status: worker_pb2.WorkerStatus) -> str:
    """free/in use/quarantined"""
    return f"{status.num_slots_free}/{status.num_slots_in_use}/{status.num_slots_quarantined}"


def block_bar(status: worker_pb2.WorkerStatus, width: int = 20) -> str:
    """The pool as a bar: held, then cached, then free. What is there at all shows at least one cell."""
    counts = (status.num_blocks_held, status.num_blocks_cached, status.num_blocks_free)
    return "".join(char * num for char, num in zip(_BAR, shares(counts, width), strict=True))


def shares(counts: Sequence[int], width: int) -> list[int]:
    """`width` cells divided in proportion, at least one for everything that is not 0; all 0 for nothing."""
    total = sum(counts)
    if total == 0:
        return [0] * len(counts)
    cells = [max(round(count / total * width), int(count > 0)) for count in counts]
    while (excess := sum(cells) - width) != 0:
        largest = cells.index(max(cells))
        cells[largest] -= 1 if excess > 0 else -1
    return cells


def bytes_per_s(rate: float | None) -> str:
    """A rate with three digits, `1.25 GB/s`, or a dash if it is not known."""
    if rate is None:
        return "–"
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.0f} B/s"


def latency(duration_s: float | None) -> str:
    """A latency with three digits, or a dash if nothing was observed."""
    if duration_s is None:
        return "–"
    return f"{duration_s:.3g} s" if duration_s >= 0.9995 else f"{duration_s * 1e3:.3g} ms"
