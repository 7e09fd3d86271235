"""All-reduce between two GPUs in a CUDA graph: `python -m benchmarks.all_reduce [--check]`.

One process a GPU. Every way is compared with the exact sum, on replayed graphs with fresh inputs, before it is timed.
Rank 0 prints microseconds a call; with --check nothing is timed.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from common.kernels.triton_rows import add_rms_norm
from common.parallel import triton_all_reduce
from common.parallel.group import TensorParallelGroup
from common.parallel.process_group import ProcessGroupCollectives
from common.parallel.symmetric_memory import SymmetricMemoryCollectives

SIZE = 2
KIB, MIB = 1 << 10, 1 << 20
NUM_BYTES = [8 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB]
NUM_ROWS = [1, 8, 32, 64, 128, 256]  # tokens of a decode step
NUM_COLUMNS = 4096
EPS = 1e-6
CALLS_IN_CHECK = 3  # odd: the regions must alternate over replays, too
CALLS_IN_GRAPH = 20
NUM_REPLAYS = 20
NUM_TIMINGS = 9

Way = Callable[[torch.Tensor], None]


class Ways:
    """The collectives of one rank, by name."""

    def __init__(self, rank: int, address: str) -> None:
        torch.cuda.set_device(rank)
        self.rank = rank
        self.device = torch.device("cuda", rank)
        self.group = TensorParallelGroup.open(rank, SIZE, address, self.device, timeout_s=60.0)
        symmetric = self.group._collectives
        assert isinstance(symmetric, SymmetricMemoryCollectives), "the GPUs cannot map each other's memory"
        self.symmetric = symmetric
        self.nccl: ProcessGroupCollectives = symmetric._large

    def of(self, num_bytes: int) -> dict[str, Way]:
        ways: dict[str, Way] = {"nccl": self.nccl.all_reduce, "group": self._group}
        if num_bytes <= self.symmetric._staging.nbytes:
            ways |= {"torch one-shot": self._torch_one_shot, "torch two-shot": self.symmetric._two_shot}
        if num_bytes <= triton_all_reduce.MAX_BYTES:
            ways["one kernel"] = self._one_kernel
        return ways

    def meet(self) -> None:
        torch.cuda.synchronize()
        self.nccl.all_reduce(torch.zeros(1, device=self.device))
        torch.cuda.synchronize()

    def inputs(self, *shape: int, seed: int) -> list[torch.Tensor]:
        """Every rank's, the same on all ranks: bfloat16."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [torch.randn(shape, device=self.device, generator=generator).bfloat16() for _ in range(SIZE)]

    def _group(self, x: torch.Tensor) -> None:
        self.group.all_reduce(x)

    def _one_kernel(self, x: torch.Tensor) -> None:
        triton_all_reduce.all_reduce(x, self.symmetric._peers)

    def _torch_one_shot(self, x: torch.Tensor) -> None:
        part = self.symmetric._staging.view(x.dtype)[: x.numel()]
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(part, x, "sum", self.symmetric._name, x)


def captured(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what `body` launches. It runs once before, so that kernels are compiled."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        body()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph


def check(ways: Ways, name: str, way: Way, num_bytes: int) -> None:
    num = num_bytes // 2
    read = torch.zeros(num, device=ways.device).bfloat16()
    written: list[torch.Tensor] = []

    def body() -> None:
        written.clear()
        for _ in range(CALLS_IN_CHECK):
            written.append(read.clone())
            way(written[-1])

    ways.meet()
    graph = captured(body)
    for seed in range(4):
        parts = ways.inputs(num, seed=seed)
        read.copy_(parts[ways.rank])
        torch.cuda.synchronize()
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        for one in written:
            assert torch.equal(one, parts[0] + parts[1]), f"{name}: wrong sum of {num_bytes} bytes"


def check_fused(ways: Ways, num_rows: int) -> None:
    weight = ways.inputs(NUM_COLUMNS, seed=99)[0]
    for seed in range(4):
        parts = ways.inputs(num_rows, NUM_COLUMNS, seed=seed)
        residual = ways.inputs(num_rows, NUM_COLUMNS, seed=seed + 50)[0]
        expected = (residual.double() + (parts[0] + parts[1]).double()).bfloat16()
        normed = torch.nn.functional.rms_norm(expected.double(), (NUM_COLUMNS,), weight.double(), EPS)
        ways.meet()
        out = fused(ways, parts[ways.rank], residual, weight)
        torch.cuda.synchronize()
        assert torch.equal(residual, expected), "fused: wrong residual"
        error = (out.double() - normed).norm() / normed.norm()
        assert error < 3e-3, f"fused: the norm is off by {error:.1e}"


def fused(ways: Ways, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = ways.group.all_reduce_add_rms_norm(x, residual, weight, EPS)
    assert out is not None, "this shape is not fused"
    return out


def apart(ways: Ways, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return add_rms_norm(ways.group.all_reduce(x), residual, weight, EPS)


def timed(ways: Ways, body: Callable[[], object]) -> float:
    """Microseconds a call of `body`, in a graph of many."""

    def many() -> None:
        for _ in range(CALLS_IN_GRAPH):
            body()

    ways.meet()
    graph = captured(many)
    times = []
    for _ in range(NUM_TIMINGS):
        ways.meet()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()
        start.record()
        for _ in range(NUM_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / (NUM_REPLAYS * CALLS_IN_GRAPH))
    return statistics.median(times)


def run_rank(rank: int, address: str, only_check: bool) -> None:
    ways = Ways(rank, address)
    for num_bytes in NUM_BYTES:
        for name, way in ways.of(num_bytes).items():
            check(ways, name, way, num_bytes)
    for num_rows in NUM_ROWS:
        check_fused(ways, num_rows)
    limit = ways.symmetric.small_bytes // KIB
    say(rank, f"checked: every way gives the exact sum on both ranks (the group uses one kernel up to {limit} KiB)")
    if not only_check:
        time_all(ways)
    ways.meet()
    ways.group.close()


def time_all(ways: Ways) -> None:
    for num_bytes in NUM_BYTES:
        x = ways.inputs(num_bytes // 2, seed=1)[ways.rank]
        times = {name: timed(ways, partial(way, x)) for name, way in ways.of(num_bytes).items()}
        shown = "  ".join(f"{name} {time:7.2f}" for name, time in times.items())
        say(ways.rank, f"{num_bytes // KIB:6d} KiB  {shown} µs")
    for num_rows in NUM_ROWS:
        x, residual = ways.inputs(num_rows, NUM_COLUMNS, seed=2)
        weight = ways.inputs(NUM_COLUMNS, seed=3)[0]

        two, one = (timed(ways, partial(way, ways, x, residual, weight)) for way in (apart, fused))
        say(
            ways.rank,
            f"{num_rows:4d} rows of {NUM_COLUMNS}: all-reduce, then add and norm {two:7.2f} µs, in one {one:7.2f} µs",
        )


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.address, arguments.check)
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--check"] if arguments.check else []
    command = [sys.executable, "-m", "benchmarks.all_reduce", "--address", address, *options]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(SIZE)]
    sys.exit(max(abs(rank.wait()) for rank in ranks))


if __name__ == "__main__":
    main()
