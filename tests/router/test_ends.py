"""A router lives on through what ends one call, and ends loudly when a part of it does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from baton.v1 import inference_pb2

from common.errors import InternalError
from common.rpc import grpc_server
from services.router.process import RouterProcess
from tests.router.cluster import running_cluster
from tests.rpc.raw_http2 import call_frames, exchange


async def test_a_path_that_is_no_utf8_is_one_refused_call(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        assert b"Method not found" in await exchange(cluster.router.port, call_frames(1, b"/\xff", b""), b"found")
        request = inference_pb2.GenerateRequest(text="abc")
        request.sampling.max_tokens = 4
        outputs = await cluster.generate(request, timeout_s=5)
        assert outputs[0].last is not None


async def test_a_server_that_ends_by_itself_ends_the_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(grpc_server._AioServer, "_make_request_call_future")  # then it ends as grpcio's own does
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # grpcio leaves a task unread
    with pytest.RaisesGroup(pytest.RaisesExc(InternalError, match="has ended"), flatten_subgroups=True):
        async with running_cluster(tmp_path) as cluster:
            await exchange(cluster.router.port, call_frames(1, b"/\xff", b""), b"CANCELLED")
            await asyncio.wait_for(asyncio.Event().wait(), 20)


async def test_a_task_that_just_ends_ends_the_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(self: RouterProcess) -> None:
        return None

    monkeypatch.setattr(RouterProcess, "_report_health", at_once)
    with pytest.RaisesGroup(pytest.RaisesExc(InternalError, match="the health report"), flatten_subgroups=True):
        async with running_cluster(tmp_path):
            await asyncio.wait_for(asyncio.Event().wait(), 20)
