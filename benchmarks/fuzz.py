"""Anything is sent to every port of a deployment; nothing may end, nobody may wait, and valid requests are answered.

    python -m benchmarks.fuzz [--inputs 100000] [--seed 1] [--first 0]

Random and damaged messages over every RPC, broken HTTP/2, connections that say nothing, read nothing or vanish, at the
gRPC, metrics and KV ports of a router, a prefill and a decode worker on this machine. An input is a function of the
seed and its number, so `--first N --inputs M` sends those of a round again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from cli.up import DEFAULT_MODEL
from tests.fuzz.campaign import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (0)")
    parser.add_argument("--seed", type=int, default=1, help="of all inputs (1)")
    parser.add_argument("--per-round", type=int, default=1000, help="inputs between two valid requests (1000)")
    parser.add_argument("--logs", type=Path, default=None, help="where the processes' logs go (nowhere)")
    args = parser.parse_args()
    start_s = time.monotonic()
    numbers = range(args.first, args.first + args.inputs)
    outcome = asyncio.run(fuzz(DEFAULT_MODEL, numbers, args.seed, args.per_round, args.logs, print))
    print(f"{outcome.num_inputs.total()} inputs in {time.monotonic() - start_s:.0f} s: {dict(outcome.num_inputs)}")
    print(f"slowest answer to a health check, seconds: { {k: round(v, 3) for k, v in outcome.slowest_s.items()} }")
    print(f"resident MB before and after: {outcome.megabytes}; {outcome.num_valid} valid requests answered")
    for fault in outcome.faults:
        print(f"FAULT: {fault}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
