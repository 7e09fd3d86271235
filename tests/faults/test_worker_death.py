"""Workers killed with SIGKILL: requests fail over or end typed, tokens come exactly once, the others go on."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cli.deployment import Deployment, DeploymentSpec, ManagedProcess
from common.errors import Unavailable
from tests.faults.settling import holds_nothing, settled, watching
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import ask, ask_all, greedy_request

FLOAT32 = ("--dtype", "float32")
SMALL_BLOCKS = (*FLOAT32, "--block-size", "16")
SLOW_PREFILL = (*SMALL_BLOCKS, "--max-step-tokens", "32")  # a transfer of a long prompt takes about a second


async def _busy(deployment: Deployment, workers: list[ManagedProcess]) -> ManagedProcess:
    """The first worker that has a request running. Raises `TimeoutError` if none gets one."""
    async with asyncio.timeout(20.0):
        while True:
            for worker in workers:
                status = await deployment.status(worker)
                if status.num_running:
                    return worker


async def test_request_fails_over_when_its_prefill_worker_is_killed_during_a_transfer(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(
        model=shipped_model, num_prefill=2, prefill_args=SLOW_PREFILL, decode_args=SMALL_BLOCKS, restart=False
    )
    (short, long) = shipped_reference.prompts((80, 1900), seed=31)
    async with deployed(spec) as (deployment, client), watching(deployment.decode[0]) as decode:
        beside = asyncio.create_task(ask(client, greedy_request(short, 200)))
        await decode.until(lambda status: status.num_running > 0, 20.0)
        request = asyncio.create_task(ask(client, greedy_request(long, 10)))
        await decode.until(lambda status: status.num_slots_in_use > 0, 20.0)
        victim = await _busy(deployment, deployment.prefill)
        os.kill(victim.pid, signal.SIGKILL)
        answer = await request
        assert answer.tokens == shipped_reference.greedy(long, 10)
        assert answer.lifetime.num_migrations >= 1
        assert answer.lifetime.prefill_worker != victim.name
        assert (await beside).tokens == shipped_reference.greedy(short, 200)
        await settled(deployment.decode[0])


async def test_request_ends_unavailable_when_the_only_prefill_worker_is_killed(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(
        model=shipped_model,
        prefill_args=SLOW_PREFILL,
        decode_args=SMALL_BLOCKS,
        router_args=("--restart-timeout-s", "1"),  # nobody starts it again
        restart=False,
    )
    (short, long) = shipped_reference.prompts((80, 1900), seed=32)
    async with deployed(spec) as (deployment, client), watching(deployment.decode[0]) as decode:
        beside = asyncio.create_task(ask(client, greedy_request(short, 200)))
        await decode.until(lambda status: status.num_running > 0, 20.0)
        request = asyncio.create_task(ask(client, greedy_request(long, 10)))
        await decode.until(lambda status: status.num_slots_in_use > 0, 20.0)
        os.kill(deployment.prefill[0].pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            await request
        assert (await beside).tokens == shipped_reference.greedy(short, 200)
        await settled(deployment.decode[0])


async def test_tokens_come_once_and_in_order_when_the_decode_worker_is_killed(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(model=shipped_model, num_decode=2, prefill_args=FLOAT32, decode_args=FLOAT32, restart=False)
    prompts = shipped_reference.prompts((80, 130, 64, 200), seed=33)
    async with deployed(spec) as (deployment, client), watching(deployment.decode[0]) as decode:
        requests = asyncio.create_task(ask_all(client, [greedy_request(prompt, 150) for prompt in prompts]))
        await decode.until(lambda status: status.num_running > 0, 20.0)
        os.kill(deployment.decode[0].pid, signal.SIGKILL)
        answers = await requests
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.tokens == shipped_reference.greedy(prompt, 150)
        assert sum(answer.lifetime.num_migrations for answer in answers) >= 1
        await settled(deployment.decode[1])


async def test_a_killed_rank_is_replaced_and_its_sequences_go_on(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(model=shipped_model, decode_tp=2, prefill_args=FLOAT32, decode_args=FLOAT32)
    (prompt,) = shipped_reference.prompts((100,), seed=34)
    async with deployed(spec) as (deployment, client), watching(deployment.decode[0]) as decode:
        request = asyncio.create_task(ask(client, greedy_request(prompt, 200), timeout_s=60.0))
        await decode.until(lambda status: status.num_running > 0, 20.0)
        os.kill(decode.latest.rank_pids[1], signal.SIGKILL)
        answer = await request
        assert answer.tokens == shipped_reference.greedy(prompt, 200)
        await settled(deployment.decode[0])


async def test_a_killed_prefill_worker_comes_back_and_serves_again(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(model=shipped_model, prefill_args=FLOAT32, decode_args=FLOAT32)
    (prompt,) = shipped_reference.prompts((100,), seed=35)
    async with deployed(spec) as (deployment, client):
        os.kill(deployment.prefill[0].pid, signal.SIGKILL)
        await deployment.prefill[0].restarted(timeout_s=30.0)
        await deployment.ready(timeout_s=60.0)
        answer = await ask(client, greedy_request(prompt, 20))
    assert answer.tokens == shipped_reference.greedy(prompt, 20)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_rank_that_freezes_while_idle_is_replaced(
    role: str, shipped_model: Path, shipped_reference: Reference
) -> None:
    # Not so little that a rank which only stands still for a while is given up as well.
    impatient = (*FLOAT32, "--step-timeout-s", "5")
    patient = ("--placement-timeout-s", "60")
    spec = DeploymentSpec(model=shipped_model, prefill_args=impatient, decode_args=impatient, router_args=patient)
    (prompt,) = shipped_reference.prompts((100,), seed=36)
    async with deployed(spec) as (deployment, client):
        (victim,) = getattr(deployment, role)
        async with watching(victim) as worker:
            await worker.until(lambda status: bool(status.rank_pids), 20.0)
            os.kill(worker.latest.rank_pids[0], signal.SIGSTOP)
            answer = await ask(client, greedy_request(prompt, 20), timeout_s=60.0)
            assert answer.tokens == shipped_reference.greedy(prompt, 20)
            await worker.until(lambda status: holds_nothing(status) and status.counters["ranks_lost"] >= 1, 10.0)


async def test_router_processes_end_with_their_supervisor(shipped_model: Path) -> None:
    spec = DeploymentSpec(
        model=shipped_model, prefill_args=FLOAT32, decode_args=FLOAT32, router_processes=2, restart=False
    )
    async with deployed(spec) as (deployment, _):
        children = psutil.Process(deployment.router.pid).children()
        assert len(children) == 2
        os.kill(deployment.router.pid, signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=10)
        assert not alive
