"""Bits that flip in a staging slot are caught by the digest; the chunk is sent again and the output is right."""

from __future__ import annotations

from pathlib import Path

from cli.deployment import DeploymentSpec
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import ask, greedy_request

FLOAT32 = ("--dtype", "float32")


async def test_flipped_bit_is_caught_and_the_chunk_is_sent_again(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    spec = DeploymentSpec(
        model=shipped_model,
        decode_tp=2,
        prefill_args=(*FLOAT32, "--corrupt-every", "3", "--max-step-tokens", "128"),
        decode_args=FLOAT32,
    )
    (prompt,) = shipped_reference.prompts((1500,), seed=41)
    async with deployed(spec) as (deployment, client):
        answer = await ask(client, greedy_request(prompt, 20))
        status = await deployment.status(deployment.decode[0])
    assert answer.tokens == shipped_reference.greedy(prompt, 20)
    assert answer.lifetime.num_chunks_resent > 0
    assert status.counters["chunks_rejected_digest_mismatch"] >= answer.lifetime.num_chunks_resent
