"""A prompt with a token that overflows fails its client, and leaves nothing behind that another could read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cli.deployment import DeploymentSpec
from common.errors import InternalError
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import ask, greedy_request
from tests.worker.spoiled_checkpoints import INFINITE_KEY, write_spoiled_checkpoint

FLOAT32 = ("--dtype", "float32")
BAD = 7


@pytest.mark.slow
@pytest.mark.parametrize("computes", ["prefill", "decode"])
async def test_a_prompt_that_overflows_in_its_middle_fails_alone_and_is_not_cached(
    computes: str, tmp_path: Path
) -> None:
    """In the second of several chunks, on one of two ranks where decode computes it."""
    model = write_spoiled_checkpoint(tmp_path / "model", BAD, INFINITE_KEY)
    reference = Reference(model)
    spec = DeploymentSpec(
        model=model,
        num_prefill=1 if computes == "prefill" else 0,
        decode_tp=1 if computes == "prefill" else 2,
        prefill_args=(*FLOAT32, "--max-step-tokens", "128"),
        decode_args=(*FLOAT32, "--chunk-tokens", "128"),
        router_args=() if computes == "prefill" else ("--local-prefill", "always"),
    )
    good, other = ([token if token != BAD else 8 for token in p] for p in reference.prompts((300, 90), seed=3))
    bad = [*good[:150], BAD, *good[151:]]
    async with deployed(spec) as (deployment, client):
        for _ in range(2):  # the second time with what is cached of it, if anything is
            failed, answer = await asyncio.gather(
                ask(client, greedy_request(bad, 10)), ask(client, greedy_request(other, 10)), return_exceptions=True
            )
            assert isinstance(failed, InternalError)
            assert "not finite" in str(failed)
            assert not isinstance(answer, BaseException)
            assert answer.tokens == reference.greedy(other, 10)
        assert (await ask(client, greedy_request(good, 10))).tokens == reference.greedy(good, 10)
        worker = next(process for process in deployment.processes if process.name == f"{computes}-0")
        status = await deployment.status(worker)
        assert status.counters["nonfinite_rows"] >= 2
        assert status.num_blocks_held == 0
