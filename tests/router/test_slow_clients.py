"""Clients that do not read keep no place from others, and are given up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from baton.v1 import inference_pb2, inference_pb2_grpc

from common.errors import Cancelled
from common.rpc.status import error_from_rpc
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import FakeDecode, letters

NUM_CLIENTS = 16


def request(num_tokens: int = 8) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello")
    made.sampling.max_tokens = num_tokens
    return made


@contextlib.asynccontextmanager
async def deaf_clients(cluster: Cluster, window_bytes: int = 0) -> AsyncIterator[inference_pb2_grpc.InferenceAsyncStub]:
    """A stub on a connection with a small window for messages, which does not grow until they are read."""
    options = [("grpc.http2.lookahead_bytes", window_bytes), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.router.port}", options=options) as channel:
        stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
        yield stub


async def until(condition: Callable[[], bool]) -> None:
    """Look again and again: places come and go without telling anybody."""
    async with asyncio.timeout(20):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0.01)


async def test_complete_outputs_that_nobody_reads_keep_no_place(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path, max_in_flight=NUM_CLIENTS, client_stall_timeout_s=3600) as cluster,
        deaf_clients(cluster) as stub,
    ):
        unread = [stub.Generate(request(), timeout=60) for _ in range(NUM_CLIENTS)]
        queue = cluster.router.admission.queue
        await until(lambda: queue.num_unread == NUM_CLIENTS)
        assert queue.num_in_flight == 0
        assert (await cluster.generate(request()))[0].token_ids == letters(0, 8)
        late = [token async for response in unread[0] for token in response.token_ids]
        assert late == letters(0, 8)
        for call in unread:
            call.cancel()
        await until(lambda: queue.num_unread == 0)


async def test_a_client_that_reads_nothing_is_given_up_and_its_sequences_with_it(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path, max_in_flight=NUM_CLIENTS, client_stall_timeout_s=0.2) as cluster,
        deaf_clients(cluster, window_bytes=256) as stub,
    ):

        async def hang(decode: FakeDecode) -> None:
            await asyncio.Event().wait()

        cluster.script.at_position[300] = hang
        unread = stub.Generate(request(400), timeout=20)
        await cluster.wait_opened()
        await cluster.wait_all_closed()
        await until(lambda: cluster.router.admission.queue.num_in_flight == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # it is told, should it read after all
            async for _ in unread:
                pass
        assert isinstance(error_from_rpc(caught.value), Cancelled)
        assert "read nothing for 0.2 s" in str(caught.value.details())
