"""Decode workers that compute prompts themselves: when they are asked to, and what the client sees of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from baton.v1 import inference_pb2, sampling_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.router.worker_list import Role
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import FakeDecode, letters

NUM_TOKENS = 6


def request(num_tokens: int = NUM_TOKENS, **fields: object) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello", **fields)  # type: ignore[arg-type]
    made.sampling.max_tokens = num_tokens
    made.sampling.logprobs = 0
    return made


async def assert_exact(cluster: Cluster, num_tokens: int = NUM_TOKENS) -> inference_pb2.Lifetime:
    outputs = await cluster.generate(request(num_tokens))
    assert outputs[0].token_ids == outputs[0].logprob_ids == letters(0, num_tokens)
    last = outputs[0].last
    assert last is not None
    assert last.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    await cluster.wait_all_closed()
    return last.lifetime


@pytest.mark.parametrize("num_tokens", [1, 2, NUM_TOKENS])
async def test_always_needs_no_prefill_worker(tmp_path: Path, num_tokens: int) -> None:
    async with running_cluster(tmp_path, num_prefills=0, local_prefill="always") as cluster:
        lifetime = await assert_exact(cluster, num_tokens)
        assert (lifetime.prefill_worker, lifetime.decode_worker, lifetime.transport) == ("decode-0", "decode-0", "")
        assert (lifetime.prefill_ns, lifetime.num_cached_tokens) == (12, 13)
        assert lifetime.queue_ns >= 11


async def test_always_leaves_prefill_workers_alone(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, local_prefill="always") as cluster:
        await assert_exact(cluster)
        assert cluster.num_prefills == 0


async def test_when_empty_turns_to_decode_when_the_prefill_pool_is_empty_and_back(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, local_prefill="when-empty") as cluster:
        assert (await assert_exact(cluster)).prefill_worker == "prefill-0"
        await cluster.prefills[0].die()
        await cluster.wait_until(lambda: not cluster.router.registry.candidates(Role.PREFILL))
        assert (await assert_exact(cluster)).prefill_worker == "decode-0"
        await cluster.prefills[0].start()
        await cluster.wait_until(lambda: bool(cluster.router.registry.candidates(Role.PREFILL)))
        assert (await assert_exact(cluster)).prefill_worker == "prefill-0"


async def test_the_router_serves_without_prefill_workers_if_it_may(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_prefills=0, local_prefill="when-empty") as cluster:
        stub = health_pb2_grpc.HealthStub(cluster.channel)
        async with asyncio.timeout(20):
            async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break


@pytest.mark.parametrize("position", range(NUM_TOKENS))
async def test_tokens_are_exact_when_decode_dies_at_any_position(tmp_path: Path, position: int) -> None:
    async with running_cluster(tmp_path, num_prefills=0, num_decodes=2, local_prefill="always") as cluster:
        cluster.script.at_position[position] = FakeDecode.die
        assert (await assert_exact(cluster)).num_migrations == 1


async def test_other_choices_wait_for_the_prompt_of_the_first(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_prefills=0, local_prefill="always") as cluster:
        cluster.script.before_decode.clear()
        running = asyncio.ensure_future(cluster.generate(request(n=3)))
        await cluster.wait_opened()
        cluster.script.before_decode.set()
        outputs = await running
        assert {index: output.token_ids for index, output in outputs.items()} == {
            choice: letters(choice, NUM_TOKENS) for choice in range(3)
        }
        assert cluster.num_opened == 3


async def first_message(cluster: Cluster, num_tokens: int = NUM_TOKENS) -> tuple[list[int], list[int]]:
    """The first message's tokens, and the rest."""
    responses = aiter(cluster.stub.Generate(request(num_tokens), timeout=20.0))
    first = list((await anext(responses)).token_ids)
    cluster.script.after_begin.set()
    return first, [token async for response in responses for token in response.token_ids]


async def test_a_steady_first_token_goes_when_the_first_step_begins(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, first_token="steady") as cluster:
        cluster.script.after_begin.clear()  # decode says that it begins, and sends no token
        assert await first_message(cluster) == (letters(0, 1), letters(0, NUM_TOKENS)[1:])


async def test_an_eager_first_token_waits_for_nothing(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        cluster.script.before_decode.clear()
        responses = aiter(cluster.stub.Generate(request(), timeout=20.0))
        assert list((await anext(responses)).token_ids) == letters(0, 1)
        cluster.script.before_decode.set()
        assert [t async for response in responses for t in response.token_ids] == letters(0, NUM_TOKENS)[1:]


async def test_a_steady_first_token_that_ends_the_output_goes_at_once(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, first_token="steady") as cluster:
        cluster.script.before_decode.clear()
        await assert_exact(cluster, num_tokens=1)


async def test_a_steady_first_token_survives_a_death_before_it_was_released(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_decodes=2, first_token="steady") as cluster:
        cluster.script.before_decode.clear()
        running = asyncio.ensure_future(assert_exact(cluster))
        dying = await cluster.wait_opened()
        await asyncio.wait_for(cluster.prefills[0].entered.wait(), 20)
        await dying.die()
        cluster.script.before_decode.set()
        assert (await running).num_migrations == 1


async def test_never_waits_for_a_prefill_worker(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_prefills=0, placement_timeout_s=0.05) as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
