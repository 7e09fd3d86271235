"""Greedy output through the whole path equals transformers, token for token, for every family and rank count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.deployment import DeploymentSpec
from tests.integration.deployments import deployed
from tests.integration.reference import PROMPT_LENGTHS, Reference
from tests.integration.requests import ask, ask_all, greedy_request
from tests.models.tiny_checkpoints import write_tiny_checkpoint

NUM_TOKENS = 20
FLOAT32 = ("--dtype", "float32")
FAMILIES = [  # family, prefill ranks, decode ranks: every family, and every pairing of rank counts
    ("llama2", 1, 1),
    ("llama3", 1, 2),
    ("qwen2", 2, 1),
    ("qwen3", 1, 4),
    ("mistral_window", 2, 4),
]


async def _compare(spec: DeploymentSpec, reference: Reference) -> None:
    prompts = reference.prompts(PROMPT_LENGTHS, seed=7)
    requests = [greedy_request(prompt, NUM_TOKENS) for prompt in prompts]
    expected = [reference.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    async with deployed(spec) as (_, client):
        for request, tokens in zip(requests, expected, strict=True):
            cold = await ask(client, request)
            assert cold.tokens == tokens
        for request, tokens in zip(requests, expected, strict=True):
            warm = await ask(client, request)
            assert warm.tokens == tokens
        assert warm.lifetime.num_cached_tokens >= 1900, "the longest prompt was not found in prefill's prefix cache"
        assert warm.lifetime.num_blocks_reused >= 30, "the longest prompt was not found in decode's prefix cache"
        fresh = reference.prompts((1, 63, 64, 65, 200, 500, 30, 90) * 4, seed=11)
        answers = await ask_all(client, [greedy_request(prompt, NUM_TOKENS) for prompt in fresh])
        for prompt, answer in zip(fresh, answers, strict=True):
            assert answer.tokens == reference.greedy(prompt, NUM_TOKENS)


@pytest.mark.parametrize(("family", "prefill_tp", "decode_tp"), FAMILIES)
async def test_random_checkpoint_matches_transformers(
    family: str, prefill_tp: int, decode_tp: int, tmp_path: Path
) -> None:
    model = write_tiny_checkpoint(family, tmp_path / family, seed=3)
    spec = DeploymentSpec(
        model=model, prefill_tp=prefill_tp, decode_tp=decode_tp, prefill_args=FLOAT32, decode_args=FLOAT32
    )
    await _compare(spec, Reference(model))


@pytest.mark.parametrize("decode_tp", [1, 2, 4])
async def test_shipped_checkpoint_matches_transformers(
    decode_tp: int, shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(model=shipped_model, decode_tp=decode_tp, prefill_args=FLOAT32, decode_args=FLOAT32)
    await _compare(spec, shipped_reference)


async def test_preemption_loses_and_repeats_nothing(shipped_model: Path, shipped_reference: Reference) -> None:
    """Sixteen sequences that grow to four blocks each, in a decode pool of twenty-four."""
    spec = DeploymentSpec(model=shipped_model, prefill_args=FLOAT32, decode_args=(*FLOAT32, "--num-blocks", "24"))
    prompts = shipped_reference.prompts((60, 100, 120, 126) * 4, seed=5)
    async with deployed(spec) as (deployment, client):
        answers = await ask_all(client, [greedy_request(prompt, 120) for prompt in prompts])
        status = await deployment.status(deployment.decode[0])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == shipped_reference.greedy(prompt, 120)
    assert status.counters["preemptions"] > 0, "the pool was large enough: nothing was preempted"
    assert status.num_blocks_held == 0


async def test_logprobs_match_transformers(shipped_model: Path, shipped_reference: Reference) -> None:
    spec = DeploymentSpec(model=shipped_model, decode_tp=2, prefill_args=FLOAT32, decode_args=FLOAT32)
    (prompt,) = shipped_reference.prompts((100,), seed=9)
    async with deployed(spec) as (_, client):
        answer = await ask(client, greedy_request(prompt, NUM_TOKENS, logprobs=5))
    expected = shipped_reference.logprobs(prompt, answer.tokens)
    assert len(answer.logprobs) == NUM_TOKENS
    for position, (token, got) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert got.chosen.token_id == token
        assert got.chosen.logprob == pytest.approx(float(expected[position, token]), abs=1e-4)
        top = torch.topk(expected[position], 5)
        assert [entry.logprob for entry in got.top] == pytest.approx(top.values.tolist(), abs=1e-4)
