"""The two backends as one fixture: a function that opens an endpoint by peer name, and closes it after the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import torch

from common.transport.base import Connection, Endpoint
from common.transport.inproc import InprocNetwork
from common.transport.registry import open_endpoint

OpenPeer = Callable[[str], Awaitable[Endpoint]]
torch.set_num_threads(1)


@pytest.fixture(params=["inproc", "ucx"])
async def open_peer(request: pytest.FixtureRequest) -> AsyncIterator[OpenPeer]:
    network = InprocNetwork()
    opened: list[Endpoint] = []

    async def open_one(name: str) -> Endpoint:
        if request.param == "inproc":
            endpoint: Endpoint = network.open("inproc://", name)
        else:
            endpoint = await open_endpoint("ucx://127.0.0.1:0", name)
        opened.append(endpoint)
        return endpoint

    yield open_one
    for endpoint in opened:
        await endpoint.close()


@pytest.fixture
async def pair(open_peer: OpenPeer) -> tuple[Connection, Connection]:
    """Both ends of a connection: (the sender's, the receiver's)."""
    return await join(await open_peer("sender"), await open_peer("receiver"))


async def join(sender: Endpoint, receiver: Endpoint, sender_name: str = "sender") -> tuple[Connection, Connection]:
    there = await sender.connect(receiver.address, 10.0)
    return there, await receiver.wait_for_peer(sender_name, 10.0)
