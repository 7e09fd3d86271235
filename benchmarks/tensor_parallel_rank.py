"""What one process of `benchmarks.tensor_parallel` does: the check, or one shape. Started by it; rank 0 prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from benchmarks.engine import BYTES_PER_S, DecodeTiming
from benchmarks.kernel_timing import measure_ceilings
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


def run_check(rank: Rank) -> None:
    num_tokens = same_tokens(rank)
    rank.told([num_tokens])
    rank.say(f"small float32 model: both ranks chose the {num_tokens} tokens that plain torch on one rank chooses")


def run_shape(rank: Rank, arguments: argparse.Namespace, copy_bytes_per_s: float) -> None:
    """Load, capture, time. What does not fit is said, and a smaller batch takes its place."""
    context, num_steps = arguments.context, arguments.steps
    decoder = _load(rank, arguments.job)
    row_blocks = blocks_of(context, num_steps)
    batches = _fitting(rank, decoder, arguments.batches, row_blocks)
    rank.enter_phase()
    bench = RankBench(rank, decoder, batches[-1] * row_blocks, tuple(batches))
    rank.say(f"graphs of {batches} captured, {rank.free_bytes() / 1e9:.1f} GB left")
    rank.say("| batch | context | step ms | p99 | graph alone | launch | floor | floor / step | of the copy's |")
    rank.say("|---|---|---|---|---|---|---|---|---|")
    for batch in batches:
        rank.enter_phase()
        timing = bench.decode(context, batch, num_steps)
        read_bytes = timing.floor_ms * BYTES_PER_S / 1e3
        rank.say(_line(timing, read_bytes, arguments.bandwidth, copy_bytes_per_s))
        if arguments.out and rank.rank == 0:
            with arguments.out.open("a") as out:
                out.write(json.dumps({"shape": arguments.job, "read_bytes": read_bytes} | asdict(timing)) + "\n")
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


def _line(timing: DecodeTiming, read_bytes: float, bandwidth: float, copy_bytes_per_s: float) -> str:
    floor_ms, copy_floor_ms = (read_bytes / rate * 1e3 for rate in (bandwidth, copy_bytes_per_s))
    return (
        f"| {timing.batch} | {timing.context} | {timing.median_ms:.3f} | {timing.p99_ms:.3f} | {timing.graph_ms:.3f} "
        f"| {timing.launch_ms:.3f} | {floor_ms:.3f} | {floor_ms / timing.median_ms:.0%} "
        f"| {copy_floor_ms / timing.median_ms:.0%} |"
    )


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written. Measured before the group opens, whose threads would break the capture."""
    torch.cuda.set_device(device)
    rate = measure_ceilings(device).copy_bytes_per_s
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return rate


def run(arguments: argparse.Namespace) -> None:
    copy_bytes_per_s = float("nan")
    if arguments.job != CHECK and not arguments.rehearse:
        copy_bytes_per_s = _copy_bandwidth(torch.device("cuda", arguments.rank))
    rank = Rank(arguments.rank, arguments.address, arguments.rehearse, arguments.phase_limit)
    if arguments.job == CHECK:
        run_check(rank)
    else:
        name = "CPU" if arguments.rehearse else torch.cuda.get_device_name(rank.device)
        rates = f"floor over {arguments.bandwidth / 1e12:.2f} TB/s, copy measured {copy_bytes_per_s / 1e12:.2f} TB/s"
        rank.say(f"\n{arguments.job} on 2 × {name}: {rates}")
        run_shape(rank, arguments, copy_bytes_per_s)
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
        sys.stdout.flush()
        os._exit(OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else 1)


if __name__ == "__main__":
    main()
