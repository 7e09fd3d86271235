"""All backends as one fixture: a function that opens an endpoint by peer name, and closes it after the test.

`nccl-protocol` is `nccl://` over communicators that copy on the CPU; what needs two GPUs is marked `two_gpus`.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import torch

from common.transport.base import Connection, Endpoint
from common.transport.inproc import InprocNetwork
from common.transport.nccl import NcclEndpoint
from common.transport.registry import open_endpoint
from common.transport.ucx_worker import Progress
from tests.transport.fake_communicator import FakeNccl
from tests.transport.memory import CPU, HOST, TWO_GPUS, Memory

OpenPeer = Callable[[str], Awaitable[Endpoint]]
torch.set_num_threads(1)

ONLY_CONNECTS = "only connects"
ACCEPTING = ("receiver", "r", "there")  # what the tests call the end that others connect to
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """What a test leaves goes now. A collection in the middle of a later one ends a UCX context there, which waits for
    the GPU, which may wait for the other end of an NCCL transfer: in this thread, which both ends share in tests only.
    """
    if torch.cuda.is_available():
        gc.collect()


@pytest.fixture(
    params=[
        "inproc",
        "ucx",
        "ucx-polling",
        "nccl-protocol",
        pytest.param("ucx-cuda", marks=[pytest.mark.gpu, needs_two_gpus]),
        pytest.param("nccl", marks=[pytest.mark.gpu, needs_two_gpus]),
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def memory(backend: str) -> Memory:
    return TWO_GPUS if backend in ("ucx-cuda", "nccl") else HOST


@pytest.fixture
async def open_peer(backend: str, memory: Memory) -> AsyncIterator[OpenPeer]:
    network, nccl = InprocNetwork(), FakeNccl()
    opened: list[Endpoint] = []

    async def open_one(name: str) -> Endpoint:
        device = str(memory.accepting if name in ACCEPTING else memory.connecting)
        listens = name != ONLY_CONNECTS
        match backend:
            case "inproc":
                endpoint: Endpoint = network.open("inproc://", name, listens)
            case "ucx":
                endpoint = await open_endpoint("ucx://127.0.0.1:0", name, listens=listens)
            case "ucx-polling":
                endpoint = await open_endpoint("ucx://127.0.0.1:0", name, progress=Progress.POLLING, listens=listens)
            case "ucx-cuda":
                polling = Progress.POLLING
                endpoint = await open_endpoint(
                    "ucx://127.0.0.1:0", name, progress=polling, memory=device, listens=listens
                )
            case "nccl":
                endpoint = await open_endpoint("nccl://127.0.0.1:0", name, memory=device, listens=listens)
            case _:
                endpoint = await NcclEndpoint.open("nccl://127.0.0.1:0", name, CPU, nccl, listens)
        opened.append(endpoint)
        return endpoint

    yield open_one
    for endpoint in opened:
        await endpoint.close()
    await nccl.close()


@pytest.fixture
async def pair(open_peer: OpenPeer) -> tuple[Connection, Connection]:
    """Both ends of a connection: (the sender's, the receiver's)."""
    return await join(await open_peer("sender"), await open_peer("receiver"))


async def join(sender: Endpoint, receiver: Endpoint, sender_name: str = "sender") -> tuple[Connection, Connection]:
    there = await sender.connect(receiver.address, 30.0)
    return there, await receiver.wait_for_peer(sender_name, 30.0)
