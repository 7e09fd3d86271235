"""How kernels are timed: medians over replays of a CUDA graph, as shares of what the device was measured to do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

READ_BYTES_PER_S: Final = 4.3e12  # of an H200, read only: reading and writing by turns is a little slower
CACHE_BYTES: Final = 200 << 20  # more than any second-level cache

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on the device at hand."""

    copy_bytes_per_s: float  # read and written
    matmul_flop_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    kernel: str
    shape: str
    us: float
    rate: str
    share: float  # of the ceiling: device memory or matrix products
    torch_us: float | None
    error: float

    def markdown(self) -> str:
        torch_us = "-" if self.torch_us is None else f"{self.torch_us:.1f}"
        cells = (
            self.kernel,
            self.shape,
            f"{self.us:.1f}",
            self.rate,
            f"{self.share:.0%}",
            torch_us,
            f"{self.error:.0e}",
        )
        return f"| {' | '.join(cells)} |"


def median_us(calls: Sequence[Call], replays: int = 7) -> float:
    """Time of one call. All are captured into one graph; together their inputs should exceed the cache."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return float(statistics.median(times))


class CacheFlush:
    """Times calls whose inputs would stay in the cache: each is followed by a write larger than the cache."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
        self._flush_us = median_us([self._flushed.zero_] * 8)

    def median_us(self, call: Call) -> float:
        return 2 * median_us([call, self._flushed.zero_] * 8) - self._flush_us


def measure_ceilings(device: torch.device) -> Ceilings:
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    # Not `copy_`, which a graph leaves to the copy engine.
    copy_us = median_us([partial(torch.neg, source, out=target)])
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_us = median_us([partial(torch.mm, a, b)] * 4)
    return Ceilings(2e6 * source.nbytes / copy_us, 2e6 * 8192**3 / matmul_us)


def measure_read_rate(device: torch.device) -> float:
    """Bytes a second of kernels that only read: the fastest of a few reductions over 2 GiB."""
    source = torch.randn(1 << 29, device=device)
    rows = source.view(1 << 14, -1)
    calls: list[Call] = [source.sum, source.amax, partial(rows.sum, dim=1), partial(rows.amax, dim=1)]
    return max(source.nbytes / median_us([call]) * 1e6 for call in calls)


def memory_row(
    kernel: str, shape: str, us: float, nbytes: int, bytes_per_s: float, torch_us: float | None, error: float
) -> Row:
    """A kernel that moves `nbytes` bytes, against a device that moves `bytes_per_s`."""
    rate = nbytes / us * 1e6
    return Row(kernel, shape, us, f"{rate / 1e12:.2f} TB/s", rate / bytes_per_s, torch_us, error)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite for NaN, so that poison never passes."""
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")
