"""Decode steps of one rank while sequences join and leave, against the same without, in one run.

    python -m benchmarks.churn [--batch 64] [--context 1024] [--joins 64] [--out FILE.json] [--check]

A model of random weights decodes a full batch; `--joins` sequences a second end and others take their places, as after
a hand-off. The decode scheduler plans, two steps ahead. Times are of events on the device's stream: a step lasts from
the end of the one before it to its own, *idle* is what lies between the end of a step and the begin of the next. Both
ways take turns. With --check the exit status is 1 if a limit is missed. Without a GPU it is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from benchmarks.churn_traffic import Traffic
from benchmarks.limits import Limit, exit_status
from benchmarks.random_model import random_decoder, read_shape
from benchmarks.rehearsal import compute_device, device_name
from benchmarks.step_times import StepTimes, Summary, summarize
from benchmarks.tensor_parallel_engine import KERNELS, small_config
from common.quiet_collector import quiet_collector

LIMITS: Final = (Limit("p99_over_median", "<=", 1.2), Limit("idle", "<=", 0.02))
FIRST_LIFE: Final = 100  # steps, before it is known how long a step takes
MIN_LIFE: Final = 8


def make_traffic(device: torch.device, shape: str, batch: int, context: int) -> Traffic:
    """The model, its captured steps and its scheduler."""
    begun = time.perf_counter()
    if device.type == "cuda":
        decoder = random_decoder(read_shape(shape), device)
    else:
        decoder = random_decoder(small_config(rehearses=True), device, torch.float32, KERNELS)
    traffic = Traffic(decoder, batch, context)
    print(f"loaded and captured in {time.perf_counter() - begun:.1f} s", flush=True)
    return traffic


def life_for(joins_per_s: float, batch: int, step_ms: float) -> int:
    """Steps of a sequence, so that in a batch that stays full so many join a second."""
    return max(MIN_LIFE, round(batch * 1e3 / (joins_per_s * step_ms)))


def measure(traffic: Traffic, batch: int, joins_per_s: float, num_steps: int, rounds: int) -> dict[str, Summary]:
    """Both ways, taking turns; `num_steps` of each in every round."""
    step_ms = summarize(traffic.steady(min(num_steps, FIRST_LIFE), min(num_steps, FIRST_LIFE))).median_ms
    life = life_for(joins_per_s, batch, step_ms)
    print(f"a step takes {step_ms:.2f} ms: sequences live {life} steps on average", flush=True)
    steady, churning = StepTimes(), StepTimes()
    for _ in range(rounds):
        extend(steady, traffic.steady(num_steps, life))
        extend(churning, traffic.churning(num_steps, life))
    return {"nobody joins": summarize(steady), "joins and leaves": summarize(churning)}


def extend(times: StepTimes, more: StepTimes) -> None:
    times.periods_ms += more.periods_ms
    times.gaps_ms += more.gaps_ms
    times.num_rows += more.num_rows
    times.num_joins += more.num_joins


def markdown(name: str, s: Summary) -> str:
    cells = [name, str(s.num_steps), f"{s.rows:.1f}", f"{s.joins_per_s:.1f}", f"{s.median_ms:.3f}", f"{s.p99_ms:.3f}"]
    cells += [f"{s.max_ms:.3f}", f"{s.p99_over_median:.3f}", f"{s.idle:.2%}", f"{s.max_gap_ms:.3f}"]
    cells.append("–" if s.joining_median_ms is None else f"{s.joining_median_ms:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure and print. Returns 1 if limits were to be checked and one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.1-8b", help="of the random weights, on a GPU (llama-3.1-8b)")
    add("--batch", type=int, default=64, help="sequences that decode (64)")
    add("--context", type=int, default=1024, help="tokens of a sequence half way through its life (1024)")
    add("--joins", type=float, default=64.0, help="sequences that join, and leave, a second (64)")
    add("--steps", type=int, default=600, help="counted in each round, each way (600)")
    add("--rounds", type=int, default=2, help="(2)")
    add("--out", type=Path, help="a JSON file")
    add("--check", action="store_true", help="exit with 1 if a limit is missed")
    add("--rehearse", action="store_true", help="on the CPU; choose a small batch, context and number of steps")
    args = parser.parse_args()
    device = compute_device(args.rehearse)
    print(device_name(device), flush=True)
    traffic = make_traffic(device, args.shape, args.batch, args.context)
    quiet_collector()  # as a rank does: a full collection would hold up a step for 80 ms
    summaries = measure(traffic, args.batch, args.joins, args.steps, args.rounds)
    print(f"batch {args.batch}, context {args.context}; milliseconds")
    print("| | steps | rows | joins/s | step median | p99 | max | p99 / median | idle | longest gap | when one joins |")
    print(f"|{'---|' * 11}")
    for name, summary in summaries.items():
        print(markdown(name, summary), flush=True)
    churning = asdict(summaries["joins and leaves"])
    print("goals: " + ", ".join(f"{limit.figure} {limit.sense} {limit.bound:g}" for limit in LIMITS))
    if args.out:
        own = {"device": device_name(device), "batch": args.batch, "context": args.context}
        args.out.write_text(json.dumps(own | {name: asdict(s) for name, s in summaries.items()}, indent=1))
    return exit_status(churning, LIMITS) if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
