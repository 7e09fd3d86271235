"""Processes that are stopped (SIGSTOP), which their connections survive: what they had goes on elsewhere in seconds,
and nothing new is sent to them until they run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from baton.v1 import inference_pb2

from cli.client import Client
from cli.deployment import DeploymentSpec
from tests.faults.settling import watching
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import Answer, ask, greedy_request

FLOAT32 = ("--dtype", "float32")
NOTICED_S = 8.0  # the promise is 5 s; a machine may be busy with something else
GONE_ON_S = 30.0  # what was lost is computed again; unnoticed, it would wait for its deadline
PATIENCE_S = 20.0
NUM_TOKENS = 150


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def _until_ready(
    client: Client, condition: Callable[[inference_pb2.GetModelInfoResponse], bool], timeout_s: float = PATIENCE_S
) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if condition(await client.model_info()):
                return
            await asyncio.sleep(0.1)


async def test_what_is_stopped_is_gone_on_with_elsewhere(shipped_model: Path, shipped_reference: Reference) -> None:
    spec = DeploymentSpec(
        model=shipped_model, num_prefill=2, num_decode=2, prefill_args=FLOAT32, decode_args=FLOAT32, restart=False
    )
    prompts = shipped_reference.prompts((80, 130, 64), seed=51)
    expected = [shipped_reference.greedy(prompt, NUM_TOKENS) for prompt in prompts]

    async with deployed(spec) as (deployment, client):
        loop = asyncio.get_running_loop()

        def ask_all() -> list[asyncio.Task[Answer]]:
            return [asyncio.create_task(ask(client, greedy_request(prompt, NUM_TOKENS))) for prompt in prompts]

        async def assert_gone_on(asked: list[asyncio.Task[Answer]]) -> list[Answer]:
            start_s = loop.time()
            answers = [await answer for answer in asked]
            assert [answer.tokens for answer in answers] == expected
            assert loop.time() - start_s < GONE_ON_S
            return answers

        async with watching(deployment.decode[0]) as decode:
            # A front that decodes.
            asked = ask_all()
            await decode.until(lambda status: status.num_running > 0, PATIENCE_S)
            with stopped(deployment.decode[0].pid):
                await _until_ready(client, lambda info: info.num_decode_workers == 1, NOTICED_S)
                answers = await assert_gone_on(asked)
                assert any(answer.lifetime.num_migrations for answer in answers)
            await _until_ready(client, lambda info: info.num_decode_workers == 2)

        # A front that is asked for prompts while it is stopped.
        with stopped(deployment.prefill[0].pid):
            asked = ask_all()
            await _until_ready(client, lambda info: info.num_prefill_workers == 1, NOTICED_S)
            await assert_gone_on(asked)
        await _until_ready(client, lambda info: info.num_prefill_workers == 2)

        async with watching(deployment.decode[1]) as decode:
            # A rank in the middle of its steps.
            asked = ask_all()
            await decode.until(lambda status: status.num_running > 0, PATIENCE_S)
            with stopped(decode.latest.rank_pids[0]):
                await decode.until(lambda status: status.counters["ranks_lost"] == 1, NOTICED_S)
                await assert_gone_on(asked)
