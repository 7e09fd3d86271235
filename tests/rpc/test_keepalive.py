"""A peer that stops answering, with its connection up, is noticed by both ends. Takes as long as that does: seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from baton.v1 import worker_pb2, worker_pb2_grpc

from common.errors import Unavailable
from common.rpc.client import open_channel
from common.rpc.status import error_from_rpc
from tests.rpc.test_server import MAX_MESSAGE_BYTES, Served

NOTICED_WITHIN_S = 5.0
SLACK_S = 2.0  # of a machine that is busy


class Link:
    """A TCP connection that can go silent: both ends stay connected, their kernels acknowledge, and nothing passes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._passes = asyncio.Event()
        self._passes.set()

    def go_silent(self) -> None:
        self._passes.clear()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        for end in (far_writer, writer):
            end.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._passes.wait()
            writer.write(data)


@contextlib.asynccontextmanager
async def linked(port: int) -> AsyncIterator[tuple[Link, str]]:
    """The link, and the address where a client finds the server behind it."""
    link = Link(port)
    server = await asyncio.start_server(link.carry, "127.0.0.1", 0)
    try:
        yield link, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_silence_ends_a_call_on_both_sides_within_five_seconds() -> None:
    async with (
        Served() as served,
        linked(served.port) as (link, address),
        open_channel(address, MAX_MESSAGE_BYTES) as ch,
    ):
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(ch)
        call = stub.WatchStatus(worker_pb2.WatchStatusRequest())
        await call.read()
        await served.servicer.entered.wait()
        link.go_silent()
        async with asyncio.timeout(NOTICED_WITHIN_S + SLACK_S):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert isinstance(error_from_rpc(caught.value), Unavailable)
            await served.servicer.cancelled.wait()
