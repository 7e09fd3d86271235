"""Greedy output through the whole path equals transformers, token for token, for every family and rank count, and so do
its log-probabilities, in float32."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch

from cli.deployment import Deployment, DeploymentSpec
from tests.integration.deployments import deployed
from tests.integration.reference import PROMPT_LENGTHS, Reference
from tests.integration.requests import Answer, ask, ask_all, greedy_request
from tests.models.tiny_checkpoints import write_tiny_checkpoint

NUM_TOKENS: Final = 20
NUM_TOP: Final = 3
BLOCK_SIZE: Final = 64
FLOAT32: Final = ("--dtype", "float32")


@dataclass(frozen=True, slots=True)
class Load:
    """Lengths of the prompts: of those that are sent one by one, twice, and of those that are sent at once."""

    alone: tuple[int, ...]
    together: tuple[int, ...]


# 32 at once, two of them long
FULL: Final = Load(PROMPT_LENGTHS, (1, 63, 64, 65, 200, 500, 30, 90) * 3 + (1, 63, 64, 2000, 65, 200, 500, 2000))
BRIEF: Final = Load((1, 64, 65, 500), (63, 200, 30, 500, 1, 90, 64, 128))

PAIRINGS: Final = [  # family, prefill ranks, decode ranks: every family with one decode rank and with several
    pytest.param("llama2", 1, 1, FULL, id="llama2-1-1"),
    pytest.param("llama3", 1, 2, FULL, id="llama3-1-2"),
    pytest.param("qwen2", 2, 1, FULL, id="qwen2-2-1"),
    pytest.param("qwen3", 1, 4, FULL, id="qwen3-1-4"),
    pytest.param("mistral_window", 2, 4, FULL, id="mistral_window-2-4"),
    pytest.param("llama2", 2, 2, BRIEF, id="llama2-2-2"),
    pytest.param("llama3", 2, 1, BRIEF, id="llama3-2-1"),
    pytest.param("llama_tied", 1, 1, BRIEF, id="llama_tied-1-1"),
    pytest.param("llama_tied", 1, 2, BRIEF, id="llama_tied-1-2"),
    pytest.param("qwen2", 1, 2, BRIEF, id="qwen2-1-2"),
    pytest.param("qwen3", 4, 1, BRIEF, id="qwen3-4-1"),  # more prefill ranks than KV heads: two hold the same ones
    pytest.param("mistral", 1, 1, BRIEF, id="mistral-1-1"),
    pytest.param("mistral", 1, 2, BRIEF, id="mistral-1-2"),
    pytest.param("mistral_window", 1, 1, BRIEF, id="mistral_window-1-1"),
]


async def _compare(spec: DeploymentSpec, reference: Reference, load: Load) -> None:
    prompts = reference.prompts(load.alone, seed=7)
    expected = [reference.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    fresh = reference.prompts(load.together, seed=11)
    async with deployed(spec) as (deployment, client):
        cold = [await ask(client, greedy_request(prompt, NUM_TOKENS, logprobs=NUM_TOP)) for prompt in prompts]
        warm = [await ask(client, greedy_request(prompt, NUM_TOKENS)) for prompt in prompts]
        together = await ask_all(client, [greedy_request(prompt, NUM_TOKENS) for prompt in fresh])
        await _ucx_brought_every_block(deployment, cold, warm, together)
    assert [answer.tokens for answer in cold] == expected
    assert [answer.tokens for answer in warm] == expected
    for prompt, answer in zip(prompts, cold, strict=True):
        _logprobs_match(reference, prompt, answer)
    _longest_was_cached(len(prompts[-1]), warm[-1])
    for prompt, answer in zip(fresh, together, strict=True):
        assert answer.tokens == reference.greedy(prompt, NUM_TOKENS)


async def _ucx_brought_every_block(deployment: Deployment, cold: list[Answer], *others: list[Answer]) -> None:
    """By what the requests say, and by what decode's ranks counted on their UCX endpoints."""
    answers = [*cold, *(answer for some in others for answer in some)]
    assert {answer.lifetime.transport.partition(":")[0] for answer in answers} == {"ucx"}
    assert all(answer.lifetime.bytes_shipped for answer in cold)
    num_bytes = sum(answer.lifetime.bytes_shipped for answer in answers)
    status = await deployment.status(deployment.decode[0])
    assert status.counters["bytes_verified"] == num_bytes
    async with asyncio.timeout(10.0):  # ranks are asked for their count, and a status does not wait for them for long
        while (await deployment.status(deployment.decode[0])).counters["bytes_received"] != num_bytes:
            pass


def _longest_was_cached(num_tokens: int, answer: Answer) -> None:
    num_blocks = (num_tokens - 1) // BLOCK_SIZE  # full ones before the last token, which is always computed
    lifetime = answer.lifetime
    assert lifetime.num_cached_tokens >= num_blocks * BLOCK_SIZE, "it was not found in prefill's prefix cache"
    assert lifetime.num_blocks_reused >= num_blocks, "it was not found in decode's prefix cache"


def _logprobs_match(reference: Reference, prompt: list[int], answer: Answer) -> None:
    expected = reference.logprobs(prompt, answer.tokens)
    assert len(answer.logprobs) == len(answer.tokens)
    for position, (token, got) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert got.chosen.token_id == token
        assert got.chosen.logprob == pytest.approx(float(expected[position, token]), abs=1e-4)
        top = torch.topk(expected[position], NUM_TOP).values.tolist()
        assert [entry.logprob for entry in got.top] == pytest.approx(top, abs=1e-4)
        named = expected[position, [entry.token_id for entry in got.top]].tolist()
        assert [entry.logprob for entry in got.top] == pytest.approx(named, abs=1e-4)


def _ask_for_a_repetition_penalty(model: Path) -> None:
    """In the file that transformers obeys too: requests that say nothing of it get it."""
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.3, "top_k": 20, "top_p": 0.8}))


@pytest.mark.parametrize(("family", "prefill_tp", "decode_tp", "load"), PAIRINGS)
async def test_random_checkpoint_matches_transformers(
    family: str, prefill_tp: int, decode_tp: int, load: Load, tmp_path: Path
) -> None:
    model = write_tiny_checkpoint(family, tmp_path / family, seed=3)
    if family == "qwen2":  # instruct checkpoints of this family are all saved so
        _ask_for_a_repetition_penalty(model)
    # With a small last chunk the last layer travels by itself.
    prefill_args = FLOAT32 if load is FULL else (*FLOAT32, "--last-chunk-bytes", "1")
    spec = DeploymentSpec(
        model=model, prefill_tp=prefill_tp, decode_tp=decode_tp, prefill_args=prefill_args, decode_args=FLOAT32
    )
    await _compare(spec, Reference(model), load)


@pytest.mark.parametrize("decode_tp", [1, 2, 4])
async def test_shipped_checkpoint_matches_transformers(
    decode_tp: int, shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(model=shipped_model, decode_tp=decode_tp, prefill_args=FLOAT32, decode_args=FLOAT32)
    await _compare(spec, shipped_reference, FULL)


async def test_preemption_loses_and_repeats_nothing(shipped_model: Path, shipped_reference: Reference) -> None:
    """Sixteen sequences that grow to four blocks each, in a decode pool of twenty-four."""
    spec = DeploymentSpec(model=shipped_model, prefill_args=FLOAT32, decode_args=(*FLOAT32, "--num-blocks", "24"))
    await _preempt(spec, shipped_reference, (60, 100, 120, 126) * 4)


async def test_preemption_on_two_ranks_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Eight sequences that grow to four blocks each, in a decode pool of sixteen."""
    model = write_tiny_checkpoint("qwen2_window", tmp_path / "model", seed=3)
    decode_args = (*FLOAT32, "--num-blocks", "16")
    spec = DeploymentSpec(model=model, decode_tp=2, prefill_args=FLOAT32, decode_args=decode_args)
    await _preempt(spec, Reference(model), (60, 100, 120, 126) * 2)


async def _preempt(spec: DeploymentSpec, reference: Reference, lengths: tuple[int, ...]) -> None:
    prompts = reference.prompts(lengths, seed=5)
    async with deployed(spec) as (deployment, client):
        answers = await ask_all(client, [greedy_request(prompt, 120) for prompt in prompts])
        status = await deployment.status(deployment.decode[0])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == reference.greedy(prompt, 120)
    assert status.counters["preemptions"] > 0, "the pool was large enough: nothing was preempted"
    assert status.num_blocks_held == 0
