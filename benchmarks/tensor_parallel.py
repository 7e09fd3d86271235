"""Decode steps of a tensor-parallel engine on two GPUs: `python -m benchmarks.tensor_parallel [--shapes llama-3.1-8b]`.

One process a GPU; both run the same plans through captured graphs, two steps under way, timed on rank 0. Checked first:
a small float32 model chooses on both ranks the tokens that one rank chooses. Each shape gets fresh processes.
*Floor*: the weights and KV bytes that one rank reads, over --bandwidth; the same over what the card was measured to
read and to copy is given as shares of a step. What runs out of memory is tried again with a smaller batch. Without two
GPUs, or with --rehearse, the same runs on two CPU ranks with interpreted kernels and a small model; its times say
nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.kernel_timing import READ_BYTES_PER_S
from benchmarks.rank_processes import TIMED_OUT, run_ranks
from common.worker.free_port import free_ports

CHECK: Final = "check"
BATCHES: Final = {"llama-3.1-8b": (1, 32, 64), "llama-3.1-70b": (1, 32)}
CONTEXT: Final = 2048
REHEARSED_BATCHES: Final = (1, 3)
REHEARSED_CONTEXT: Final = 100
SIZE: Final = 2
OUT_OF_MEMORY: Final = 75  # exit status of a rank, see `tensor_parallel_rank`


class Jobs:
    """Runs a job at a time on fresh ranks, all of them within one limit."""

    def __init__(self, arguments: argparse.Namespace, rehearses: bool) -> None:
        self._deadline_s = time.monotonic() + arguments.limit
        self._context = REHEARSED_CONTEXT if rehearses else CONTEXT
        self._options = [
            *(
                "--context",
                str(self._context),
                "--steps",
                str(arguments.steps),
                "--bandwidth",
                str(arguments.bandwidth),
            ),
            *("--phase-limit", str(arguments.phase_limit)),
            *(["--rehearse"] if rehearses else []),
            *(["--out", str(arguments.out)] if arguments.out else []),
        ]

    def run(self, job: str, batches: Sequence[int] = ()) -> int:
        """The exit status of the rank that failed first, or 0."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            print(f"{job}: no time left", file=sys.stderr, flush=True)
            return TIMED_OUT
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "benchmarks.tensor_parallel_rank", "--job", job, *self._options]
        command += ["--address", f"127.0.0.1:{port}", "--batches", *map(str, batches)]
        return run_ranks([[*command, "--rank", str(rank)] for rank in range(SIZE)], left_s)

    def run_shape(self, shape: str, batches: Sequence[int]) -> int:
        """Tries again with half the largest batch as long as a rank runs out of memory nevertheless."""
        status = self.run(shape, batches)
        while status == OUT_OF_MEMORY and max(batches) > 1:
            smaller = sorted({*batches, max(batches) // 2} - {max(batches)})
            print(f"{shape}: OUT OF MEMORY with batches {list(batches)}, trying {smaller}", flush=True)
            batches = smaller
            status = self.run(shape, batches)
        return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--batches", type=int, nargs="+", help="instead of each shape's own")
    parser.add_argument("--steps", type=int, default=200, help="timed decode steps of each case (200)")
    parser.add_argument("--bandwidth", type=float, default=READ_BYTES_PER_S, help="bytes/s that the floor assumes")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--phase-limit", type=float, default=150.0, help="seconds for loading, capture or a case")
    parser.add_argument("--out", type=Path, help="a JSON line for each case")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    rehearses = arguments.rehearse or torch.cuda.device_count() < SIZE
    if rehearses:
        os.environ["TRITON_INTERPRET"] = "1"
        print("REHEARSAL on two CPU ranks, a small model instead of each shape: times say nothing", flush=True)
    if arguments.out:
        arguments.out.write_text("")
    jobs = Jobs(arguments, rehearses)
    statuses = {CHECK: jobs.run(CHECK)}
    if statuses[CHECK] == 0:
        for shape in arguments.shapes:
            own = REHEARSED_BATCHES if rehearses else BATCHES[shape]
            statuses[shape] = jobs.run_shape(shape, arguments.batches or own)
    failed = {job: status for job, status in statuses.items() if status}
    if failed:
        print(f"FAILED, job: exit status of a rank: {failed}", file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
