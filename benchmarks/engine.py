"""A rank's engine on one GPU with random weights: checked against plain torch, then decode steps and prefill are timed.

    python -m benchmarks.engine [--only decode|prefill] [--out FILE.json]

Steps go through the runner as plans, two under way at a time, as in a worker. Prints tables with targets and floors.
What finds no memory is left out, and said. Without a GPU, or with --rehearse, it is a rehearsal with a small model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.engine_check import logit_errors, same_tokens
from benchmarks.engine_steps import Bench, DecodeTiming, PrefillTiming, blocks_for
from benchmarks.random_model import random_decoder, read_shape
from benchmarks.rehearsal import compute_device, device_name
from benchmarks.tensor_parallel_engine import KERNELS, small_config
from common.models.decoder import Decoder
from common.quiet_collector import quiet_collector

DECODE_CASES = [(1024, n) for n in (1, 8, 32, 64, 128, 256)] + [(8192, n) for n in (1, 8, 32, 64)]
# Of a Llama-3.1-8B shape, milliseconds: the goal, and vLLM 0.26.0 in bf16 (docs/performance.md, Beside vLLM).
_1K_MS = [(4.0, 4.94), (4.4, 5.21), (5.3, 6.21), (6.4, 7.48), (8.8, 10.47), (13.6, 17.32)]
_8K_MS = [(4.3, 5.02), (6.2, 6.76), (12.7, 12.85), (21.8, 20.98)]
DECODE_MS = dict(zip(DECODE_CASES, [*_1K_MS, *_8K_MS], strict=True))
PREFILL_MS = {512: (13, 16.1), 2048: (46, 52.5), 8192: (200, 217.6), 32768: (1130, 1203)}
# prompts, tokens of each, tokens of a step
PREFILL_CASES = [(1, 512, 2048), (1, 2048, 2048), (1, 8192, 2048), (1, 8192, 8192)]
PREFILL_CASES += [(1, 32768, 2048), (1, 32768, 8192), (32, 2048, 2048), (32, 2048, 8192)]
MAX_BLOCKS: Final = 8700  # enough for every case
REHEARSED_BLOCKS: Final = 16
REHEARSED_DECODE: Final = [(100, 1), (100, 3), (300, 8)]  # the last one finds too few blocks
REHEARSED_PREFILL: Final = [(1, 100, 48), (3, 40, 64), (20, 64, 64)]  # the last one finds too few


@dataclass(frozen=True, slots=True)
class Cases:
    """What is timed, and on how many blocks at most."""

    decode: list[tuple[int, int]]  # context, batch
    prefill: list[tuple[int, int, int]]
    max_blocks: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({batch for _, batch in self.decode}))

    @property
    def max_rows(self) -> int:
        return max(1, *self.sizes, *(prompts for prompts, _, _ in self.prefill))


def print_decode(timing: DecodeTiming) -> None:
    target, vllm = DECODE_MS.get((timing.context, timing.batch), ("–", "–"))
    print(
        f"| {timing.context} | {timing.batch} | {timing.median_ms:.2f} | {timing.p99_ms:.2f} | {timing.graph_ms:.2f} "
        f"| {timing.idle:.1%} | {timing.launch_ms:.2f} | {target} | {vllm} | {timing.floor_ms:.2f} "
        f"| {timing.floor_ms / timing.median_ms:.0%} |",
        flush=True,
    )


def print_prefill(timing: PrefillTiming) -> None:
    target, vllm = PREFILL_MS.get(timing.num_tokens, ("–", "–")) if timing.num_prompts == 1 else ("–", "–")
    rate = timing.num_prompts * timing.num_tokens / timing.ms * 1e3
    print(
        f"| {timing.num_prompts} × {timing.num_tokens} | {timing.chunk} | {timing.ms:.1f} | {rate:,.0f} "
        f"| {target} | {vllm} | {timing.floor_ms:.1f} | {timing.floor_ms / timing.ms:.0%} |",
        flush=True,
    )


def check(device: torch.device) -> dict[str, float]:
    print(f"small float32 model: {same_tokens(device)} tokens as plain torch chooses them", flush=True)
    errors = logit_errors(device)
    print("bf16 logits against float32:", ", ".join(f"{k} {v:.2e}" for k, v in errors.items()), flush=True)
    assert errors["engine"] < 1.5 * errors["plain torch"] + 1e-3
    torch.cuda.empty_cache()
    return errors


def time_decode(bench: Bench, cases: Sequence[tuple[int, int]], num_steps: int) -> list[DecodeTiming]:
    print("| context | batch | step ms | p99 | graph alone | idle | launch | target | vLLM | floor | share |")
    print(f"|{'---|' * 11}")
    timings = []
    for context, batch in cases:
        needed = blocks_for(batch, context + num_steps // 2 + 10)
        if needed > bench.num_blocks:
            print(f"LEFT OUT: context {context}, batch {batch} needs {needed} of {bench.num_blocks} blocks", flush=True)
            continue
        timings.append(bench.decode(context, batch, num_steps))
        print_decode(timings[-1])
    return timings


def time_prefill(bench: Bench, cases: Sequence[tuple[int, int, int]]) -> list[PrefillTiming]:
    print("| prompts | chunk | ms | tokens/s | target | vLLM | floor | share |\n|---|---|---|---|---|---|---|---|")
    timings = []
    for num_prompts, num_tokens, chunk in cases:
        needed, name = blocks_for(num_prompts, num_tokens), f"{num_prompts} × {num_tokens} in steps of {chunk}"
        if needed > bench.num_blocks:
            print(f"LEFT OUT: {name} needs {needed} of {bench.num_blocks} blocks", flush=True)
            continue
        try:
            timings.append(bench.prefill(num_prompts, num_tokens, chunk))
        except torch.OutOfMemoryError as error:
            print(f"LEFT OUT: {name}: {str(error).splitlines()[0]}", flush=True)
            continue
        print_prefill(timings[-1])
    return timings


def print_kernels(bench: Bench, batches: Sequence[int]) -> None:
    for batch in batches:
        print(f"kernels of a step, context 1024, batch {batch}:")
        for name, calls, us in bench.top_kernels(1024, batch, 14):
            print(f"  {us:8.1f} us {calls:5d} × {us / max(calls, 1):7.2f}  {name[:90]}", flush=True)


def load(device: torch.device) -> Decoder:
    if device.type == "cpu":
        return random_decoder(small_config(rehearses=True), device, torch.float32, KERNELS)
    return random_decoder(read_shape("llama-3.1-8b"), device)


def chosen_cases(only: str | None, rehearses: bool, max_blocks: int) -> Cases:
    decode = REHEARSED_DECODE if rehearses else DECODE_CASES
    prefill = REHEARSED_PREFILL if rehearses else PREFILL_CASES
    blocks = min(max_blocks, REHEARSED_BLOCKS) if rehearses else max_blocks
    return Cases([] if only == "prefill" else decode, [] if only == "decode" else prefill, blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="a JSON file")
    add("--blocks", type=int, default=MAX_BLOCKS, help=f"KV blocks of 8 MiB, or as many as fit ({MAX_BLOCKS})")
    add("--steps", type=int, default=120, help="decode steps of each case (120)")
    add("--only", choices=("decode", "prefill"), help="leave the other kind out")
    add("--skip-prefill", dest="only", action="store_const", const="decode", help="the same as --only decode")
    add("--skip-check", action="store_true")
    add("--profile", type=int, nargs="*", default=[1, 64], help="batch sizes whose kernels are shown (1 64)")
    add("--rehearse", action="store_true", help="on the CPU")
    args = parser.parse_args()
    device = compute_device(args.rehearse)
    checks = not (args.skip_check or device.type == "cpu")
    results: dict[str, object] = {"device": device_name(device), "errors": check(device) if checks else {}}
    cases = chosen_cases(args.only, device.type == "cpu", args.blocks)
    bench = Bench(load(device), cases.max_blocks, cases.max_rows, cases.sizes)
    quiet_collector()  # as a rank does
    results["decode"] = [asdict(timing) for timing in time_decode(bench, cases.decode, args.steps)]
    results["prefill"] = [asdict(timing) for timing in time_prefill(bench, cases.prefill)]
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    if cases.decode and device.type == "cuda":
        print_kernels(bench, args.profile)


if __name__ == "__main__":
    main()
