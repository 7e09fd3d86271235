"""Decode workers that compute prompts give the same tokens as a prefill pool, and stand in for an empty one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from cli.client import Client
from cli.deployment import DeploymentSpec
from tests.integration.deployments import deployed
from tests.integration.reference import PROMPT_LENGTHS, Reference
from tests.integration.requests import ask, ask_all, greedy_request
from tests.models.tiny_checkpoints import write_tiny_checkpoint

NUM_TOKENS = 20
FLOAT32 = ("--dtype", "float32")
ALWAYS = ("--local-prefill", "always")


async def _compare(client: Client, reference: Reference, lengths: tuple[int, ...], num_tokens: int, seed: int) -> None:
    prompts = reference.prompts(lengths, seed)
    answers = await ask_all(client, [greedy_request(prompt, num_tokens) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == reference.greedy(prompt, num_tokens)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "mistral_window"])
async def test_chunks_beside_decode_steps_match_transformers(family: str, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(family, tmp_path / family, seed=3)
    reference = Reference(model)
    spec = DeploymentSpec(
        model=model,
        num_prefill=0,
        decode_tp=2 if family == "llama3" else 1,
        decode_args=(*FLOAT32, "--chunk-tokens", "100"),  # chunks that end within blocks
        router_args=ALWAYS,
    )
    async with deployed(spec) as (_, client):
        for prompt in reference.prompts(PROMPT_LENGTHS, seed=7):
            for _ in range(2):  # the second time from the prefix cache
                answer = await ask(client, greedy_request(prompt, NUM_TOKENS))
                assert answer.tokens == reference.greedy(prompt, NUM_TOKENS)
        assert answer.lifetime.num_cached_tokens >= 1900, "the longest prompt was not found in the prefix cache"
        assert answer.lifetime.prefill_worker == answer.lifetime.decode_worker == "decode-0"
        assert answer.lifetime.bytes_shipped == 0
        await _compare(client, reference, (1, 63, 64, 65, 200, 500, 30, 90) * 2, NUM_TOKENS, seed=11)


async def test_preemption_of_local_sequences_loses_and_repeats_nothing(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(
        model=shipped_model, num_prefill=0, decode_args=(*FLOAT32, "--num-blocks", "12"), router_args=ALWAYS
    )
    async with deployed(spec) as (deployment, client):
        await _compare(client, shipped_reference, (60, 100, 120, 126) * 2, 120, seed=5)
        status = await deployment.status(deployment.decode[0])
    assert status.counters["preemptions"] > 0, "the pool was large enough: nothing was preempted"
    assert status.num_blocks_held == 0


async def test_decode_stands_in_for_a_prefill_pool_that_died(shipped_model: Path, shipped_reference: Reference) -> None:
    spec = DeploymentSpec(
        model=shipped_model,
        prefill_args=FLOAT32,
        decode_args=FLOAT32,
        router_args=("--local-prefill", "when-empty", "--first-token", "steady"),
        restart=False,
    )
    prompt, other = shipped_reference.prompts((100, 200), seed=21)
    async with deployed(spec) as (deployment, client):
        before = await ask(client, greedy_request(prompt, NUM_TOKENS))
        os.kill(deployment.prefill[0].pid, signal.SIGKILL)
        try:
            after = await ask(client, greedy_request(other, NUM_TOKENS))
        except grpc.aio.AioRpcError as error:
            pytest.fail(f"the request failed with its prefill worker: {error.details()}")
    assert before.lifetime.prefill_worker == "prefill-0"
    assert after.lifetime.prefill_worker == "decode-0"
    assert before.tokens == shipped_reference.greedy(prompt, NUM_TOKENS)
    assert after.tokens == shipped_reference.greedy(other, NUM_TOKENS)
