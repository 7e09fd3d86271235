"""Channels reach their peer themselves."""

from __future__ import annotations

import pytest
from baton.v1 import worker_pb2

from tests.rpc.test_server import Served


async def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with Served() as served:
        assert await served.stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=20) == worker_pb2.WorkerStatus()
