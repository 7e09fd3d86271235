"""What is particular to `ucx://`: processes that die, strangers that connect, the lane, and the progress modes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import torch
from ucxx._lib.arr import Array
from ucxx._lib.libucxx import UCXEndpoint

from common.errors import InvalidArgument, PeerLost, TransferTimeout, Unavailable
from common.short_sleep import Patience, WatchCounts, loop_watch
from common.transport.base import CancelOutcome, Connection
from common.transport.hello import HELLO_BYTES
from common.transport.ucx import UcxEndpoint, parse_ucx_url
from common.transport.ucx_worker import LoopWorker, Progress
from tests.transport.traffic import MIB, canary, pattern, until, until_arriving, untouched

BIG_BYTES = 256 * MIB
DEATH_SEEN_WITHIN_S = 10.0

Child = asyncio.subprocess.Process


@pytest.fixture
async def endpoint() -> AsyncIterator[UcxEndpoint]:
    one = UcxEndpoint("ucx://127.0.0.1:0", "parent")
    yield one
    await one.close()


@pytest.fixture
async def child(endpoint: UcxEndpoint) -> AsyncIterator[Child]:
    process = await started_child(endpoint)
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def started_child(endpoint: UcxEndpoint) -> Child:
    """A process that connects, and sends when it is told to."""
    arguments = ("-m", "tests.transport.sending_peer", endpoint.address, str(BIG_BYTES))
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=asyncio.subprocess.PIPE)


async def kill(child: Child) -> float:
    os.kill(child.pid, signal.SIGKILL)
    return time.monotonic()


async def test_a_killed_sender_ends_its_transfer_with_peer_lost(endpoint: UcxEndpoint, child: Child) -> None:
    connection = await endpoint.wait_for_peer("child", 60.0)
    buffer = canary(BIG_BYTES)
    arriving, unmatched = connection.post_receive(1, buffer), connection.post_receive(3, canary(10))
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    await until_arriving(arriving)
    killed_at = await kill(child)
    for receive in (arriving, unmatched):
        with pytest.raises(PeerLost):
            await receive.wait()
    assert time.monotonic() - killed_at < DEATH_SEEN_WITHIN_S
    assert not connection.alive
    assert await arriving.cancel(1.0) is CancelOutcome.PEER_LOST
    await connection.drained()
    buffer.fill_(0xC5)
    await child.wait()
    assert untouched(buffer)


async def test_a_killed_receiver_ends_a_send_with_peer_lost(endpoint: UcxEndpoint, child: Child) -> None:
    connection = await endpoint.wait_for_peer("child", 60.0)
    sending = asyncio.create_task(connection.send(2, torch.zeros(BIG_BYTES, dtype=torch.uint8)))
    await asyncio.sleep(0)
    killed_at = await kill(child)
    with pytest.raises(PeerLost):
        await sending
    assert time.monotonic() - killed_at < DEATH_SEEN_WITHIN_S
    await connection.drained()
    assert endpoint.stats().connections == 0


async def test_an_idle_connection_notices_the_death_of_its_peer(endpoint: UcxEndpoint, child: Child) -> None:
    connection = await endpoint.wait_for_peer("child", 60.0)
    await kill(child)
    await until(lambda: not connection.alive, DEATH_SEEN_WITHIN_S)


async def join(sender: UcxEndpoint, receiver: UcxEndpoint) -> tuple[Connection, Connection]:
    return await sender.connect(receiver.address, 10.0), await receiver.wait_for_peer("sender", 10.0)


async def test_the_lane_between_cpus_is_tcp_and_is_remembered(endpoint: UcxEndpoint) -> None:
    sender = UcxEndpoint("ucx://127.0.0.1:0", "sender")
    here, there = await join(sender, endpoint)
    assert (here.lane, there.lane) == ("tcp", "tcp")
    await sender.close()
    assert here.lane == "tcp"


async def test_polling_carries_the_same_bytes() -> None:
    receiver = UcxEndpoint("ucx://127.0.0.1:0", "receiver", Progress.POLLING)
    sender = UcxEndpoint("ucx://127.0.0.1:0", "sender", Progress.POLLING)
    here, there = await join(sender, receiver)
    buffer = canary(MIB)
    receive = there.post_receive(1, buffer)
    await asyncio.gather(here.send(1, pattern(MIB, 0)), receive.wait())
    assert torch.equal(buffer, pattern(MIB, 0))
    await sender.close()
    await receiver.close()


@pytest.mark.parametrize("progress", list(Progress), ids=str)
async def test_an_idle_endpoint_sleeps(progress: Progress) -> None:
    receiver = UcxEndpoint("ucx://127.0.0.1:0", "receiver", progress)
    sender = UcxEndpoint("ucx://127.0.0.1:0", "sender", progress)
    here, there = await join(sender, receiver)
    there.post_receive(1, canary(10))
    receive = there.post_receive(2, canary(MIB))
    await asyncio.gather(here.send(2, pattern(MIB, 0)), receive.wait())
    await asyncio.sleep(0.2)
    used_before_s = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used_before_s < 0.1
    await sender.close()
    await receiver.close()


async def test_a_send_that_nobody_takes_is_looked_at_with_rests() -> None:
    endpoint = UcxEndpoint("ucx://127.0.0.1:0", "parent", Progress.POLLING)
    child = await started_child(endpoint)
    connection = await endpoint.wait_for_peer("child", 60.0)
    os.kill(child.pid, signal.SIGSTOP)
    sending = asyncio.create_task(connection.send(2, torch.zeros(BIG_BYTES, dtype=torch.uint8)))
    await asyncio.sleep(0.1)
    watch, used_before_s = loop_watch(), time.thread_time()
    watch.counts = WatchCounts()
    await asyncio.sleep(0.5)
    assert 0 < watch.counts.num_turns <= watch.counts.num_rests + 1
    assert watch.counts.num_turns < 0.6 / Patience().longest_s
    assert time.thread_time() - used_before_s < 0.25
    await kill(child)
    with pytest.raises(PeerLost):
        await sending
    await endpoint.close()
    await child.wait()


async def test_a_server_that_never_answers_times_out(endpoint: UcxEndpoint) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    with pytest.raises((TransferTimeout, PeerLost)):
        await asyncio.wait_for(endpoint.connect(f"ucx://127.0.0.1:{port}", 0.3), 20.0)
    silent.close()


async def test_a_stranger_that_speaks_no_ucx_disturbs_nobody(endpoint: UcxEndpoint) -> None:
    port = parse_ucx_url(endpoint.address)[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 64)
    sender = UcxEndpoint("ucx://127.0.0.1:0", "sender")
    here, there = await join(sender, endpoint)
    receive = there.post_receive(1, canary(10))
    await asyncio.gather(here.send(1, pattern(10, 0)), receive.wait())
    assert endpoint.stats().connections == 1
    writer.close()
    await writer.wait_closed()
    await sender.close()


async def test_a_peer_that_says_no_hello_is_shut_out(endpoint: UcxEndpoint) -> None:
    worker = LoopWorker(Progress.EVENT, lambda _: None)
    stranger = UCXEndpoint.create(worker.ucx, "127.0.0.1", parse_ucx_url(endpoint.address)[1], True)
    frame = bytearray(b"x" * HELLO_BYTES)
    memory = Array(frame)
    worker.track(stranger.stream_send(memory), (memory, frame), lambda _: None)
    await until(lambda: not stranger.alive)
    assert endpoint.stats().connections == 0
    stranger.close_blocking()
    worker.close()


class _Departed:
    """A UCX endpoint whose peer left just now: `ucxx` knows, and nobody has been told."""

    alive = False

    def stream_send(self, _: Array) -> None:
        raise RuntimeError("Endpoint is closing or has already closed.")

    def close_blocking(self) -> None:
        pass


async def test_a_peer_that_left_before_the_hello_is_lost(
    endpoint: UcxEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.transport.ucx.UCXEndpoint", SimpleNamespace(create=lambda *_: _Departed()))
    with pytest.raises(PeerLost, match="closed"):
        await endpoint.connect("ucx://127.0.0.1:1", 5.0)
    assert endpoint.stats().connections == 0


async def test_a_taken_port_is_unavailable(endpoint: UcxEndpoint) -> None:
    with pytest.raises(Unavailable, match="cannot listen"):
        UcxEndpoint(endpoint.address, "second")


@pytest.mark.parametrize(
    "url", ["ucx://", "ucx://host", "ucx://:1", "ucx://h:x", "ucx://h:1/p", "tcp://h:1", "ucx://h:99999"]
)
def test_a_bad_url_is_an_invalid_argument(url: str) -> None:
    with pytest.raises(InvalidArgument, match="url"):
        parse_ucx_url(url)
