"""A router as a target: what is asked for, what is counted, and by what name each failure goes. Over real gRPC."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import InvalidArgument, ResourceExhausted, Unavailable
from loadtest.targets.base import ModelInfo, TargetSpec
from loadtest.targets.baton import open_baton
from tests.loadtest.fake_inference import CONTEXT_LENGTH, VOCAB_SIZE, FakeInference, serving


async def test_a_request_asks_for_exactly_so_many_greedy_tokens() -> None:
    async with serving(FakeInference()) as fake, open_baton(TargetSpec("baton", fake.address, "fake")) as target:
        counts: list[int] = []
        account = await target.generate(target.prepare("load-3", [5, 6, 7], 4), 30.0, counts.append)
    (request,) = fake.requests
    assert (list(request.token_ids.ids), request.request_id, request.model) == ([5, 6, 7], "load-3", "fake")
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.ignore_eos) == (4, 0.0, True)
    assert sampling.HasField("temperature")
    assert 25.0 < fake.deadlines_s[0] <= 30.0
    assert counts == [1, 1, 1, 1]
    assert account.num_cached_tokens == 3
    assert (account.lifetime_ns["queue_ns"], account.lifetime_ns["total_ns"]) == (7, 11)
    assert "transport" not in account.lifetime_ns


async def test_the_model_is_described() -> None:
    async with serving(FakeInference()) as fake, open_baton(TargetSpec("baton", fake.address)) as target:
        assert await target.describe() == ModelInfo("fake", VOCAB_SIZE, CONTEXT_LENGTH, (500,))


async def test_a_router_without_workers_is_unavailable() -> None:
    fake = FakeInference(num_prefill_workers=0)
    async with serving(fake), open_baton(TargetSpec("baton", fake.address)) as target:
        with pytest.raises(Unavailable, match="0 prefill and 1 decode"):
            await target.describe()


async def test_nobody_there_is_unavailable() -> None:
    async with open_baton(TargetSpec("baton", "127.0.0.1:9")) as target:
        with pytest.raises(Unavailable):
            await target.describe()


@pytest.mark.parametrize("error", [ResourceExhausted("full"), InvalidArgument("token_ids", 3, "none")])
async def test_what_the_router_refuses_keeps_its_type(error: ResourceExhausted | InvalidArgument) -> None:
    fake = FakeInference(num_before_end=0, error=error)
    async with serving(fake), open_baton(TargetSpec("baton", fake.address)) as target:
        with pytest.raises(type(error), match=str(error)):
            await target.generate(target.prepare("a", [1], 4), 30.0, lambda count: None)


async def test_a_router_that_dies_in_the_middle_is_unavailable() -> None:
    fake = FakeInference(num_before_end=2)
    async with serving(fake), open_baton(TargetSpec("baton", fake.address)) as target:
        counts: list[int] = []
        call = asyncio.create_task(target.generate(target.prepare("a", [1], 4), 30.0, counts.append))
        await fake.stalled.wait()
        assert fake.server is not None
        await fake.server.stop(0.0)
        with pytest.raises(Unavailable):
            await call
    assert counts == [1, 1]


async def test_cancelling_cancels_on_the_router() -> None:
    fake = FakeInference(num_before_end=2)
    async with serving(fake), open_baton(TargetSpec("baton", fake.address)) as target:
        call = asyncio.create_task(target.generate(target.prepare("a", [1], 4), 30.0, lambda count: None))
        await fake.stalled.wait()
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        async with asyncio.timeout(20):
            await fake.cancelled.wait()


async def test_requests_take_the_connections_in_turn() -> None:
    fake = FakeInference()
    async with serving(fake), open_baton(TargetSpec("baton", fake.address, num_connections=3)) as target:
        await target.describe()
        for _ in range(6):
            await target.generate(target.prepare("a", [1], 1), 30.0, lambda count: None)
    assert [fake.peers.count(peer) for peer in dict.fromkeys(fake.peers)] == [2, 2, 2]
