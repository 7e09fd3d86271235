"""A client that goes away, or whose deadline passes, at any stage: nothing of it is left a second later."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from baton.v1 import worker_pb2

from cli.client import Client
from cli.deployment import DeploymentSpec
from common.errors import DeadlineExceeded
from tests.faults.settling import SETTLE_S, Watcher, holds_nothing, watching
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import ask, greedy_request

FLOAT32 = ("--dtype", "float32")
Condition = Callable[[worker_pb2.WorkerStatus], bool]
STAGES: dict[str, tuple[str, Condition]] = {
    "queued": ("prefill", lambda status: status.num_waiting > 0),
    "prefill": ("prefill", lambda status: status.num_running > 0),
    "transfer": ("decode", lambda status: status.num_slots_in_use > 0),
    "decode": ("decode", lambda status: status.num_running > 0),
}


def _spec(model: Path) -> DeploymentSpec:
    # Few rows and small steps, so that every stage lasts long enough to be met.
    prefill = (*FLOAT32, "--max-rows", "2", "--max-step-tokens", "128")
    return DeploymentSpec(model=model, decode_tp=2, prefill_args=prefill, decode_args=FLOAT32)


async def test_cancelled_or_expired_requests_leave_nothing_behind(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    async with (
        deployed(_spec(shipped_model)) as (deployment, client),
        watching(deployment.prefill[0]) as prefill,
        watching(deployment.decode[0]) as decode,
    ):
        watchers = {"prefill": prefill, "decode": decode}
        for stage, (role, condition) in STAGES.items():
            prompts = shipped_reference.prompts((1500, 1500, 1500, 700), seed=len(stage))
            await _cancel_at(client, prompts, watchers[role], condition, watchers)
        for timeout_s in (0.02, 0.15, 0.4, 0.8):
            (prompt,) = shipped_reference.prompts((1800,), seed=int(timeout_s * 100))
            with pytest.raises(DeadlineExceeded):
                await ask(client, greedy_request(prompt, 2000), timeout_s=timeout_s)
            await _settle(watchers)
        await _outputs_beside_cancelled_ones_are_right(client, shipped_reference)
        await _settle(watchers)


async def _cancel_at(
    client: Client, prompts: list[list[int]], watcher: Watcher, condition: Condition, watchers: dict[str, Watcher]
) -> None:
    tasks = [asyncio.create_task(ask(client, greedy_request(prompt, 1500))) for prompt in prompts]
    try:
        await watcher.until(condition, 30.0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await _settle(watchers)


async def _settle(watchers: dict[str, Watcher]) -> None:
    for watcher in watchers.values():
        await watcher.until(holds_nothing, SETTLE_S)


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
