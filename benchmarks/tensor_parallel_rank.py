"""What one process of `benchmarks.tensor_parallel` does: the check, or one shape. Started by it; rank 0 prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.engine_steps import BYTES_PER_S, DecodeTiming
from benchmarks.kernel_timing import measure_ceilings, measure_read_rate
from benchmarks.random_model import BLOCK_SIZE, random_decoder, read_shape
from benchmarks.tensor_parallel_engine import (
    GIB,
    KERNELS,
    Rank,
    RankBench,
    blocks_of,
    fitting,
    same_tokens,
    small_config,
)
from common.models.decoder import Decoder
from common.parent_death import end_with_parent

CHECK: Final = "check"
OUT_OF_MEMORY: Final = 75  # exit status
SPARE_BYTES: Final = GIB  # for graphs, workspaces, sampling state and what NCCL still takes
PROFILED_BATCH: Final = 64
NUM_KERNELS: Final = 16
P99_FROM: Final = 100  # steps: of fewer, the p99 is the largest
_OUT_OF_MEMORY_MESSAGES: Final = ("out of memory", "alloc failed")  # lower case, underscores as spaces


@dataclass(frozen=True, slots=True)
class Rates:
    """What the card was measured to do, bytes a second. NaN in a rehearsal."""

    read: float  # nothing is written
    copy: float  # read and written, both counted

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """Before the group opens, whose threads would break the capture."""
        torch.cuda.set_device(device)
        rates = cls(measure_read_rate(device), measure_ceilings(device).copy_bytes_per_s)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return rates


def run_check(rank: Rank) -> None:
    num_tokens = same_tokens(rank)
    rank.told([num_tokens])
    rank.say(f"small float32 model: both ranks chose the {num_tokens} tokens that plain torch on one rank chooses")


def run_shape(rank: Rank, arguments: argparse.Namespace, rates: Rates) -> None:
    """Load, capture, time. What does not fit is said, and a smaller batch takes its place."""
    context, num_steps = arguments.context, arguments.steps
    decoder = _load(rank, arguments.job)
    row_blocks = blocks_of(context, num_steps)
    batches = _fitting(rank, decoder, arguments.batches, row_blocks)
    rank.enter_phase()
    bench = RankBench(rank, decoder, batches[-1] * row_blocks, tuple(batches))
    rank.say(f"graphs of {batches} captured, {rank.free_bytes() / 1e9:.1f} GB left")
    slowest = "p99" if num_steps - 2 >= P99_FROM else "max"  # so many periods are counted
    rank.say(
        f"| batch | context | step ms | {slowest} | graph alone | launch | floor | floor / step "
        "| of the read rate | of the copy rate |"
    )
    rank.say(f"|{'---|' * 10}")
    for batch in batches:
        rank.enter_phase()
        timing = bench.decode(context, batch, num_steps)
        read_bytes = timing.floor_ms * BYTES_PER_S / 1e3
        rank.say(_line(timing, read_bytes, arguments.bandwidth, rates))
        if arguments.out and rank.rank == 0:
            with arguments.out.open("a") as out:
                own = {"shape": arguments.job, "read_bytes": read_bytes, "rates": asdict(rates), "slowest": slowest}
                out.write(json.dumps(own | asdict(timing)) + "\n")
    if PROFILED_BATCH in batches and not rank.rehearses:
        rank.enter_phase()
        rank.told([0])
        rank.say(f"kernels of a step on rank 0, context {context}, batch {PROFILED_BATCH}:")
        for name, calls, us in bench.top_kernels(context, PROFILED_BATCH, NUM_KERNELS):
            rank.say(f"  {us:8.1f} us {calls:5d} × {us / max(calls, 1):7.2f}  {name[:90]}")


def _load(rank: Rank, shape: str) -> Decoder:
    """Tensors are drawn whole, one after the other, in the model's dtype: the peak says what that takes."""
    config = small_config(True) if rank.rehearses else read_shape(shape)
    dtype = torch.float32 if rank.rehearses else torch.bfloat16
    rank.enter_phase()
    decoder = random_decoder(config, rank.device, dtype, KERNELS, group=rank.group)
    own = f"{shape}: {decoder.num_parameters * dtype.itemsize / 1e9:.2f} GB of weights on rank 0"
    if not rank.rehearses:
        peak = torch.cuda.max_memory_reserved(rank.device)
        rank.release()
        kept = torch.cuda.memory_reserved(rank.device)
        own += f"; torch held {peak / 1e9:.2f} GB at most while they were drawn, {kept / 1e9:.2f} GB afterwards"
    rank.say(own)
    return decoder


def _fitting(rank: Rank, decoder: Decoder, wanted: Sequence[int], row_blocks: int) -> list[int]:
    """The same on every rank. Raises `torch.OutOfMemoryError` if not even one row fits."""
    config = decoder.config
    block_bytes = config.num_layers * 2 * len(decoder.shard.kv_heads) * BLOCK_SIZE * config.head_dim
    row_bytes = row_blocks * block_bytes * decoder.dtype.itemsize
    free_bytes = rank.free_bytes() - SPARE_BYTES
    batches = fitting(wanted, row_bytes, free_bytes)
    numbers = f"{row_bytes / 1e9:.3f} GB of blocks a row, room for {free_bytes / 1e9:.2f} GB"
    rank.say(f"batches {batches}: {numbers}")
    if batches != sorted(wanted):
        rank.say(f"DOES NOT FIT: batches {list(wanted)} were asked for, {max(wanted) * row_bytes / 1e9:.2f} GB")
    if not batches:
        raise torch.OutOfMemoryError(f"no batch fits: {numbers}")
    return batches


def _line(timing: DecodeTiming, read_bytes: float, bandwidth: float, rates: Rates) -> str:
    floor_ms, read_ms, copy_ms = (read_bytes / rate * 1e3 for rate in (bandwidth, rates.read, rates.copy))
    return (
        f"| {timing.batch} | {timing.context} | {timing.median_ms:.3f} | {timing.p99_ms:.3f} | {timing.graph_ms:.3f} "
        f"| {timing.launch_ms:.3f} | {floor_ms:.3f} | {floor_ms / timing.median_ms:.0%} "
        f"| {read_ms / timing.median_ms:.0%} | {copy_ms / timing.median_ms:.0%} |"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it came from, says so.

    Libraries that are called while a graph is captured raise plain errors, and so does the end of a broken capture.
    """
    for one in _chain(error):
        message = str(one).lower().replace("_", " ")
        if isinstance(one, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(one, RuntimeError) and any(phrase in message for phrase in _OUT_OF_MEMORY_MESSAGES):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from; contexts may form a circle."""
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [other for other in (one.__cause__, one.__context__) if other is not None]


def run(arguments: argparse.Namespace) -> None:
    rates = Rates(float("nan"), float("nan"))
    if arguments.job != CHECK and not arguments.rehearse:
        rates = Rates.measure(torch.device("cuda", arguments.rank))
    rank = Rank(arguments.rank, arguments.address, arguments.rehearse, arguments.phase_limit)
    if arguments.job == CHECK:
        run_check(rank)
    else:
        name = "CPU" if arguments.rehearse else torch.cuda.get_device_name(rank.device)
        measured = f"measured on rank 0: read {rates.read / 1e12:.2f} TB/s, copy {rates.copy / 1e12:.2f} TB/s"
        rank.say(f"\n{arguments.job} on 2 × {name}: floor over {arguments.bandwidth / 1e12:.2f} TB/s; {measured}")
        run_shape(rank, arguments, rates)
    rank.close()


def main() -> None:
    end_with_parent(os.environ)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[])
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bandwidth", type=float, required=True)
    parser.add_argument("--phase-limit", type=float, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    try:
        run(parser.parse_args())
    except Exception as error:  # the process edge. No orderly exit: other ranks' kernels may wait for this one's
        print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        no_memory = is_out_of_memory(error)
        if no_memory and not isinstance(error, torch.OutOfMemoryError):
            print(f"a rank is out of memory, which it learnt as {type(error).__name__}", flush=True)
        sys.stdout.flush()
        os._exit(OUT_OF_MEMORY if no_memory else 1)


if __name__ == "__main__":
    main()
