"""A client that goes away, or whose deadline passes, at any stage: nothing of it is left soon after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.v1 import worker_pb2

from cli.client import Client
from cli.deployment import Deployment, DeploymentSpec, ManagedProcess
from cli.scrape import scrape
from common.errors import DeadlineExceeded
from common.worker.free_port import free_ports
from tests.faults.settling import Watcher, settled, watching
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import Answer, ask, greedy_request

FLOAT32 = ("--dtype", "float32")
PROMPT_LENGTHS = (1500, 1500, 1500, 700)
DEADLINE_S = 2.0  # idle workers show any stage within a tenth of it
Condition = Callable[[worker_pb2.WorkerStatus], bool]
STAGES: dict[str, tuple[str, Condition]] = {
    "queued": ("prefill", lambda status: status.num_waiting > 0),
    "prefill": ("prefill", lambda status: status.num_running > 0),
    "transfer": ("decode", lambda status: status.num_slots_in_use > 0),
    "decode": ("decode", lambda status: status.num_running > 0),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A deployment of one worker of each role, with their Prometheus ports."""

    client: Client
    workers: dict[str, ManagedProcess]
    metrics_ports: dict[str, int]

    async def holds_nothing_any_more(self) -> None:
        """Within `SETTLE_S` from now, by the workers' statuses; then at once by their metrics."""
        await settled(*self.workers.values())
        for role, port in self.metrics_ports.items():
            scraped = await scrape(f"http://127.0.0.1:{port}/metrics", timeout_s=5.0)
            for name, state in (("blocks", "held"), ("slots", "in_use"), ("slots", "quarantined")):
                assert scraped.value(f"baton_{role}_{name}", state=state) == 0, f"{role}: {name} {state}"
            for name in ("requests_waiting", "requests_running", "waiting_tokens", "grants_waiting"):
                assert scraped.value(f"baton_{role}_{name}") == 0, f"{role}: {name}"
            if role == "decode":
                num_opened = scraped.value("baton_decode_sequences_opened_total")
                assert scraped.total("baton_decode_sequences_ended_total") == num_opened


@contextlib.asynccontextmanager
async def _cluster(model: Path) -> AsyncIterator[Cluster]:
    ports = dict(zip(("prefill", "decode"), free_ports(2), strict=True))
    metrics = {role: ("--metrics-port", str(port)) for role, port in ports.items()}
    # Few rows and small steps, so that every stage lasts long enough to be met.
    prefill_args = (*FLOAT32, *metrics["prefill"], "--max-rows", "2", "--max-step-tokens", "128")
    spec = DeploymentSpec(
        model=model,
        decode_tp=2,
        prefill_args=prefill_args,
        decode_args=(*FLOAT32, *metrics["decode"]),
        router_args=("--no-refuse-late",),  # whoever would come too late is to come
    )
    async with deployed(spec) as (deployment, client):
        yield Cluster(client, _workers(deployment), ports)


def _workers(deployment: Deployment) -> dict[str, ManagedProcess]:
    return {"prefill": deployment.prefill[0], "decode": deployment.decode[0]}


async def test_cancelled_requests_leave_nothing_behind(shipped_model: Path, shipped_reference: Reference) -> None:
    async with _cluster(shipped_model) as cluster:
        for seed, stage in enumerate(STAGES):
            await _cancel_at(stage, cluster, shipped_reference.prompts(PROMPT_LENGTHS, seed))
            await cluster.holds_nothing_any_more()
        await _outputs_beside_cancelled_ones_are_right(cluster.client, shipped_reference)
        await cluster.holds_nothing_any_more()


async def test_expired_requests_leave_nothing_behind(shipped_model: Path, shipped_reference: Reference) -> None:
    async with _cluster(shipped_model) as cluster:
        for seed, stage in enumerate(STAGES):
            await _expire_at(stage, cluster, shipped_reference.prompts(PROMPT_LENGTHS, seed))
            await cluster.holds_nothing_any_more()


async def _cancel_at(stage: str, cluster: Cluster, prompts: list[list[int]]) -> None:
    role, condition = STAGES[stage]
    async with watching(cluster.workers[role]) as watcher:
        tasks = _ask_all(cluster.client, prompts, timeout_s=60.0)
        try:
            await watcher.until(condition, 30.0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _expire_at(stage: str, cluster: Cluster, prompts: list[list[int]]) -> None:
    """Hold the stage, once it is there, until the deadline of every request has passed."""
    role, condition = STAGES[stage]
    async with watching(cluster.workers[role]) as watcher:
        tasks = _ask_all(cluster.client, prompts, timeout_s=DEADLINE_S)
        await watcher.until(condition, DEADLINE_S)
        with _frozen(watcher):
            async with watching(cluster.workers[role]) as frozen:
                await frozen.until(condition, DEADLINE_S)
            assert not any(task.done() for task in tasks), "the deadline passed before the stage was there"
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * len(tasks)


def _ask_all(client: Client, prompts: list[list[int]], timeout_s: float) -> list[asyncio.Task[Answer]]:
    requests = [greedy_request(prompt, 1500) for prompt in prompts]
    return [asyncio.create_task(ask(client, request, timeout_s)) for request in requests]


@contextlib.contextmanager
def _frozen(watcher: Watcher) -> Iterator[None]:
    """The worker's ranks stand still, as a machine that swaps does. Its front goes on."""
    pids = list(watcher.latest.rank_pids)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def _outputs_beside_cancelled_ones_are_right(client: Client, reference: Reference) -> None:
    chance = random.Random(4)
    kept = reference.prompts((65, 300, 100, 64) * 2, seed=21)
    dropped = reference.prompts((400, 900, 70) * 3, seed=22)
    doomed = [asyncio.create_task(ask(client, greedy_request(prompt, 400))) for prompt in dropped]
    answers = [asyncio.create_task(ask(client, greedy_request(prompt, 24))) for prompt in kept]
    for task, answer in zip(doomed, answers, strict=False):
        if chance.random() < 0.5:
            await answer  # some are cancelled early, some after others have finished
        task.cancel()
    for task in doomed:
        task.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)
    for prompt, answer in zip(kept, answers, strict=True):
        assert (await answer).tokens == reference.greedy(prompt, 24)
