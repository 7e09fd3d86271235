"""A request whose deadline passed is late for everybody, whoever noticed first; one that is given up before is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from baton.v1 import inference_pb2

from common.errors import DeadlineExceeded
from services.router.metrics import OUTCOMES
from tests.router.cluster import Cluster, running_cluster


def request() -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello")
    made.sampling.max_tokens = 50
    return made


def counted(cluster: Cluster) -> dict[str, int]:
    """Requests by outcome, without those of which there are none."""
    read = cluster.router.metrics.registry.get_sample_value
    counts = {outcome: int(read("baton_router_requests_total", {"outcome": outcome}) or 0) for outcome in OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


class Call:
    """What gRPC says of a call. Its client reads until `is_gone`."""

    def __init__(self, remaining_s: float) -> None:
        self._remaining_s = remaining_s
        self.is_gone = False

    def time_remaining(self) -> float:
        return self._remaining_s

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        if self.is_gone:
            raise grpc.aio.UsageError("the call is over")


async def generate(cluster: Cluster, call: Call) -> None:
    await cluster.router.servicer.Generate(request(), cast(Any, call))


async def test_a_call_that_grpc_cancels_when_its_time_is_up_is_late(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        cluster.script.before_first_token.clear()
        generating = asyncio.ensure_future(generate(cluster, Call(0.1)))
        await asyncio.wait_for(cluster.prefills[0].entered.wait(), 20)
        generating.cancel()
        with pytest.raises(DeadlineExceeded):
            await generating
        assert counted(cluster) == {"DeadlineExceeded": 1}


async def test_a_call_that_is_cancelled_before_is_cancelled(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        cluster.script.before_first_token.clear()
        generating = asyncio.ensure_future(generate(cluster, Call(60.0)))
        await asyncio.wait_for(cluster.prefills[0].entered.wait(), 20)
        generating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await generating
        assert counted(cluster) == {"Cancelled": 1}


async def test_a_client_that_is_gone_when_its_time_is_up_was_late(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        call = Call(0.1)
        call.is_gone = True
        with pytest.raises(DeadlineExceeded):
            await generate(cluster, call)
        assert counted(cluster) == {"DeadlineExceeded": 1}


async def test_every_one_of_many_late_requests_is_told_and_counted_so(tmp_path: Path) -> None:
    num_requests = 40

    async def outcome(cluster: Cluster) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(request(), timeout_s=0.4)
        return caught.value.code()

    async with running_cluster(tmp_path) as cluster:
        cluster.script.before_decode.clear()
        told = await asyncio.gather(*(outcome(cluster) for _ in range(num_requests)))
        assert set(told) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        await cluster.wait_all_closed()
    # One whose client gave up before its message was read is none of ours.
    assert set(counted(cluster)) == {"DeadlineExceeded"}


async def test_grpcs_clock_of_a_call_to_prefill_is_not_the_requests(tmp_path: Path) -> None:
    """Were they one time, the stream could be reset before the worker says what its request's deadline is."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.generate(request(), timeout_s=20.0)
        (prefill,) = cluster.prefills
        assert prefill.times_remaining[0] > prefill.requests[0].sequence.timeout_ns / 1e9 + 1.0
