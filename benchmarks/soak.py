"""What is lost when workers die: requests under way while workers and ranks are killed at random.

    python -m benchmarks.soak [--seconds 90] [--local-prefill when-empty] [--first-token steady]

Two prefill and two decode workers on this machine, a decode pool too small for all, clients that cancel and clients
with too little time. Every greedy output is compared with transformers on the same weights; a request that is neither
given up by its client nor out of time must end well; and afterwards no worker may hold a block or a slot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from cli.up import DEFAULT_MODEL
from common.errors import BatonError, DeadlineExceeded
from tests.integration.reference import Reference
from tests.integration.requests import ask, greedy_request

FLOAT32 = ("--dtype", "float32")
PROMPT_LENGTHS = (5, 63, 64, 65, 120, 200, 300, 40) * 2
NUM_TOKENS = 40
NUM_CLIENTS = 10
PATIENCE_S, IMPATIENCE_S = 60.0, 0.05
SETTLING_S = 20.0  # the last kill comes so long before the end
SHARE_CANCELLED, SHARE_IMPATIENT = 0.15, 0.05


@dataclass
class Soak:
    """One run's clients and killer, and what they saw."""

    deployment: Deployment
    client: Client
    cases: list[tuple[list[int], list[int]]]  # prompt, expected output
    end_s: float  # of time.monotonic()
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    num_moves: int = 0
    faults: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Until the time is up; raises nothing that a request ended with."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._kill())
            for _ in range(NUM_CLIENTS):
                tasks.create_task(self._send())

    async def _send(self) -> None:
        while time.monotonic() < self.end_s:
            mood = self.rng.random()
            if mood < SHARE_CANCELLED:
                try:
                    async with asyncio.timeout(self.rng.random() * 0.3):
                        await self._ask(PATIENCE_S)
                except TimeoutError:
                    self.outcomes["given up by its client"] += 1
            else:
                await self._ask(IMPATIENCE_S if mood < SHARE_CANCELLED + SHARE_IMPATIENT else PATIENCE_S)

    async def _ask(self, timeout_s: float) -> None:
        prompt, expected = self.rng.choice(self.cases)
        try:
            answer = await ask(self.client, greedy_request(prompt, NUM_TOKENS), timeout_s)
        except DeadlineExceeded:
            self.outcomes["out of time"] += 1
            if timeout_s == PATIENCE_S:
                self.faults.append(f"a request did not end within {timeout_s:g} s")
        except BatonError as error:
            self.outcomes[type(error).__name__] += 1
            self.faults.append(f"a request failed: {type(error).__name__}: {error}")
        else:
            self.outcomes["complete"] += 1
            self.num_moves += answer.lifetime.num_migrations
            if answer.tokens != expected:
                self.faults.append(f"wrong tokens: {answer.tokens} instead of {expected}")

    async def _kill(self) -> None:
        while time.monotonic() < self.end_s - SETTLING_S:
            await asyncio.sleep(self.rng.uniform(2.0, 6.0))
            worker = self.rng.choice([*self.deployment.prefill, *self.deployment.decode])
            pids, what = [worker.pid], f"{worker.role} worker"
            if self.rng.random() < 0.5:
                with contextlib.suppress(grpc.aio.AioRpcError):  # it is starting: the worker itself, then
                    pids = [*(await self.deployment.status(worker, 2.0)).rank_pids] or pids
                    what = f"{worker.role} rank"
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(pids), signal.SIGKILL)
                self.kills[what] += 1

    async def check_nothing_is_held(self) -> None:
        """Every worker is back, and has nothing of what is over."""
        await self.deployment.ready(60.0)
        for worker in (*self.deployment.prefill, *self.deployment.decode):
            status = await self.deployment.status(worker)
            held = (
                status.num_blocks_held,
                status.num_slots_in_use,
                status.num_waiting + status.num_open,
                status.num_running,
            )
            if any(held):
                self.faults.append(f"{worker.name} holds blocks, slots, waiting, running: {held}")


async def soak(args: argparse.Namespace, log_dir: Path) -> Soak:
    """Deploy, run, check."""
    reference = Reference(DEFAULT_MODEL)
    prompts = reference.prompts(PROMPT_LENGTHS, seed=3)
    cases = [(prompt, reference.greedy(prompt, NUM_TOKENS)) for prompt in prompts]
    spec = DeploymentSpec(
        model=DEFAULT_MODEL,
        num_prefill=2,
        num_decode=2,
        prefill_args=FLOAT32,
        decode_args=(*FLOAT32, "--num-blocks", "64"),
        router_args=("--local-prefill", args.local_prefill, "--first-token", args.first_token),
        log_dir=log_dir,
    )
    async with Deployment(spec) as deployment, connect(deployment.router_address) as client:
        await deployment.ready(90.0)
        run = Soak(deployment, client, cases, time.monotonic() + args.seconds, random.Random(args.seed))
        await run.run()
        await run.check_nothing_is_held()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long requests are sent (90)")
    parser.add_argument("--local-prefill", choices=("never", "when-empty", "always"), default="when-empty")
    parser.add_argument("--first-token", choices=("eager", "steady"), default="steady")
    parser.add_argument("--seed", type=int, default=1, help="of what is sent and who is killed (1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as log_dir:
        run = asyncio.run(soak(args, Path(log_dir)))
    print(f"requests: {dict(run.outcomes)}, {run.num_moves} moves to other workers")
    print(f"kills: {dict(run.kills)}")
    for fault in run.faults:
        print(f"FAULT: {fault}")
    print("every complete output was right, and nothing is held" if not run.faults else "FAILED")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
