"""What is lost when processes die or stand still: requests under way while they are killed and frozen at random.

    python -m benchmarks.soak [--seconds 90] [--local-prefill when-empty] [--first-token steady]

Two router processes, two prefill and two decode workers on this machine, a decode pool too small for all, clients
that cancel and clients with too little time. Every greedy output is compared with transformers on the same weights; a
request that is neither given up by its client nor out of time must end well, if need be asked again because its router
was killed; nobody may wait beyond a deadline; and afterwards no worker may hold a block or a slot.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_troubles import Troubles
from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from cli.up import DEFAULT_MODEL
from common.errors import BatonError, DeadlineExceeded, ResourceExhausted, Unavailable
from tests.integration.reference import Reference
from tests.integration.requests import Answer, ask, greedy_request

FLOAT32 = ("--dtype", "float32")
PROMPT_LENGTHS = (5, 63, 64, 65, 120, 200, 300, 40) * 2
NUM_TOKENS = 40
NUM_CLIENTS = 10
PATIENCE_S, IMPATIENCE_S = 60.0, 0.05
LATENESS_S = 2.0  # of a client's own event loop; all processes share two cores
RETRY_S = 0.2
SETTLING_S = 20.0  # the last trouble begins so long before the end
SHARE_CANCELLED, SHARE_IMPATIENT = 0.15, 0.05


@dataclass
class Soak:
    """One run's clients, and what they saw."""

    deployment: Deployment
    client: Client
    troubles: Troubles
    cases: list[tuple[list[int], list[int]]]  # prompt, expected output
    end_s: float  # of time.monotonic()
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    num_moves: int = 0
    faults: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Until the time is up; raises nothing that a request ended with."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.troubles.run(self.end_s - SETTLING_S))
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
        start_s = time.monotonic()
        try:
            answer = await self._answer(prompt, start_s + timeout_s)
        except DeadlineExceeded:
            self.outcomes["out of time"] += 1
            if timeout_s == PATIENCE_S:
                self.faults.append(f"a request did not end within {timeout_s:g} s")
        except ResourceExhausted as error:
            self.outcomes["refused at once"] += 1
            if timeout_s == PATIENCE_S:
                self.faults.append(f"a request with {timeout_s:g} s was refused: {error}")
        except BatonError as error:
            self.outcomes[type(error).__name__] += 1
            self.faults.append(f"a request failed: {type(error).__name__}: {error}")
        else:
            self.outcomes["complete"] += 1
            self.num_moves += answer.lifetime.num_migrations
            if answer.tokens != expected:
                self.faults.append(f"wrong tokens: {answer.tokens} instead of {expected}")
        late_s = time.monotonic() - start_s - timeout_s
        if late_s > LATENESS_S:
            self.faults.append(f"a client waited {late_s:.1f} s beyond its deadline")

    async def _answer(self, prompt: list[int], deadline_s: float) -> Answer:
        """Asks again if the router was killed or stopped: what it had ends with it."""
        while True:
            try:
                remaining_s = max(deadline_s - time.monotonic(), 0.001)
                return await ask(self.client, greedy_request(prompt, NUM_TOKENS), remaining_s)
            except Unavailable:
                if not self.troubles.router_is_in_trouble():
                    raise
                self.outcomes["asked again"] += 1
                await asyncio.sleep(RETRY_S)

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
        router_processes=2,
        prefill_args=FLOAT32,
        decode_args=(*FLOAT32, "--num-blocks", "64"),
        router_args=("--local-prefill", args.local_prefill, "--first-token", args.first_token),
        log_dir=log_dir,
    )
    async with Deployment(spec) as deployment, connect(deployment.router_address) as client:
        await deployment.ready(90.0)
        rng = random.Random(args.seed)
        troubles = Troubles(deployment, random.Random(args.seed))
        run = Soak(deployment, client, troubles, cases, time.monotonic() + args.seconds, rng)
        await run.run()
        await run.check_nothing_is_held()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long requests are sent (90)")
    parser.add_argument("--local-prefill", choices=("never", "when-empty", "always"), default="when-empty")
    parser.add_argument("--first-token", choices=("eager", "steady"), default="steady")
    parser.add_argument("--logs", type=Path, default=None, help="where the processes' logs go and stay")
    parser.add_argument("--seed", type=int, default=1, help="of what is sent and who is killed or frozen (1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as log_dir:
        run = asyncio.run(soak(args, args.logs or Path(log_dir)))
    print(f"requests: {dict(run.outcomes)}, {run.num_moves} moves to other workers")
    print(f"troubles: {dict(sorted(run.troubles.counts.items()))}")
    for fault in run.faults:
        print(f"FAULT: {fault}")
    print("every complete output was right, and nothing is held" if not run.faults else "FAILED")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
