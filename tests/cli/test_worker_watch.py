"""What is shown of a worker: its statuses, and that it says none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from baton.v1 import worker_pb2, worker_pb2_grpc

from cli.worker_watch import follow_status, get_status
from common.rpc.server import RpcServer
from tests.rpc.garbage import GARBAGE, with_garbage


class Babbler(worker_pb2_grpc.WorkerServicer):
    """Says one status, and then what is none."""

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[Any]:
        yield worker_pb2.WorkerStatus(worker_id="w")
        yield GARBAGE

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> Any:  # noqa: N802
        return GARBAGE

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:  # noqa: N802
        raise AssertionError("nobody drains")


async def test_what_is_no_status_counts_as_no_answer() -> None:
    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
    server.add(with_garbage(worker_pb2_grpc.add_WorkerServicer_to_server), Babbler(), "baton.v1.Worker")
    address = f"127.0.0.1:{await server.start()}"
    seen: list[str | None] = []
    both = asyncio.Event()

    def on_status(status: worker_pb2.WorkerStatus | None) -> None:
        seen.append(None if status is None else status.worker_id)
        if len(seen) == 2:
            both.set()

    watching = asyncio.create_task(follow_status(address, on_status))
    await asyncio.wait_for(both.wait(), 20)
    watching.cancel()
    assert seen[:2] == ["w", None]
    assert await get_status(address, 20.0) is None
    await server.stop(0)
