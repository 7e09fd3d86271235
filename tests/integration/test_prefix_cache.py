"""A shared prefix is neither computed nor shipped twice, and never shared between tenants."""

from __future__ import annotations

from pathlib import Path

from cli.deployment import DeploymentSpec
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import ask, greedy_request

FLOAT32 = ("--dtype", "float32")
NUM_PREFIX_TOKENS = 1000
NUM_PREFIX_BLOCKS = NUM_PREFIX_TOKENS // 64


async def test_second_request_ships_and_computes_only_what_is_new(
    shipped_model: Path, shipped_reference: Reference
) -> None:
    prefix, first_tail, second_tail = shipped_reference.prompts((NUM_PREFIX_TOKENS, 90, 130), seed=51)
    spec = DeploymentSpec(model=shipped_model, decode_tp=2, prefill_args=FLOAT32, decode_args=FLOAT32)
    async with deployed(spec) as (_, client):
        first = await ask(client, greedy_request(prefix + first_tail, 8))
        second = await ask(client, greedy_request(prefix + second_tail, 8))
        stranger_request = greedy_request(prefix + second_tail, 8)
        stranger_request.tenant = "somebody else"
        stranger = await ask(client, stranger_request)

    assert first.lifetime.num_cached_tokens == 0
    assert first.lifetime.num_blocks_reused == 0
    assert second.lifetime.num_cached_tokens == NUM_PREFIX_BLOCKS * 64
    assert second.usage.num_cached_tokens == NUM_PREFIX_BLOCKS * 64
    assert second.lifetime.num_blocks_reused == NUM_PREFIX_BLOCKS
    total_blocks = -(-(NUM_PREFIX_TOKENS + 130) // 64)
    assert second.lifetime.num_blocks_shipped == total_blocks - NUM_PREFIX_BLOCKS
    assert stranger.lifetime.num_cached_tokens == 0
    assert stranger.lifetime.num_blocks_reused == 0
    assert first.tokens == shipped_reference.greedy(prefix + first_tail, 8)
    assert second.tokens == stranger.tokens == shipped_reference.greedy(prefix + second_tail, 8)
