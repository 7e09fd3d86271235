"""`inproc://`: endpoints of one process and one event loop, for tests and the fault simulator.

Bytes move only inside the tasks of a connection, a chunk at a time with a turn of the event loop between
chunks, so a cancel or a close can come in the middle of a message as on a real wire. It knows no clock.
"""

from __future__ import annotations

import asyncio

import torch

from common.errors import FailedPrecondition, InvalidArgument, PeerLost, Truncated
from common.transport.base import TransportStats
from common.transport.counters import Counters
from common.transport.faults import Fault, FaultScript, MessageInfo, no_faults
from common.transport.pair_secret import NO_SECRET
from common.transport.peers import PeerBook, check_peer_name
from common.transport.posted import MatchList, Receive, check_buffer, check_tag

CHUNK_BYTES = 1 << 20
_SCHEME = "inproc://"


class InprocNetwork:
    """The endpoints that can reach each other. Give each simulation its own."""

    def __init__(self, fault_script: FaultScript = no_faults) -> None:
        self._fault_script = fault_script
        self._endpoints: dict[str, InprocEndpoint] = {}
        self._num_messages = 0
        self._num_anonymous = 0

    def open(self, url: str, name: str, listens: bool = True) -> InprocEndpoint:
        """Listen at `inproc://host`; an empty host picks one. Raises `InvalidArgument` if it is taken."""
        check_peer_name(name)
        if not url.startswith(_SCHEME):
            raise InvalidArgument("url", url, f"starts with {_SCHEME}")
        if not listens:
            return InprocEndpoint(self, "", name)
        address = url
        if url == _SCHEME:
            self._num_anonymous += 1
            address = f"{_SCHEME}any-{self._num_anonymous}"
        if address in self._endpoints:
            raise InvalidArgument("url", url, "somebody listens there already")
        self._endpoints[address] = endpoint = InprocEndpoint(self, address, name)
        return endpoint

    def find(self, address: str) -> InprocEndpoint | None:
        return self._endpoints.get(address)

    def leave(self, endpoint: InprocEndpoint) -> None:
        self._endpoints.pop(endpoint.address, None)

    def fault_of(self, sender: str, receiver: str, tag: int, num_bytes: int) -> Fault:
        info = MessageInfo(sender, receiver, tag, num_bytes, self._num_messages)
        self._num_messages += 1
        return self._fault_script(info) or Fault()


class InprocEndpoint:
    """One peer on an `InprocNetwork`. See `base.Endpoint`."""

    def __init__(self, network: InprocNetwork, address: str, name: str) -> None:
        self.network = network
        self.name = name
        self.connections: set[InprocConnection] = set()
        self.peers: PeerBook[InprocConnection] = PeerBook()
        self.counters = Counters()
        self._address = address
        self._closed = False

    @property
    def address(self) -> str:
        return self._address

    async def connect(self, address: str, timeout_s: float, secret: bytes = NO_SECRET) -> InprocConnection:
        if self._closed:
            raise FailedPrecondition("the transport endpoint is closed")
        listener = self.network.find(address)
        if listener is None:
            raise PeerLost(f"nobody listens at {address}")
        here, there = InprocConnection(self, listener.name), InprocConnection(listener, self.name)
        here.other, there.other = there, here
        self.connections.add(here)
        listener.connections.add(there)
        crowded_out = listener.peers.arrived(there, secret)
        if crowded_out is not None:
            await crowded_out.close()
        return here

    async def wait_for_peer(self, peer_name: str, timeout_s: float, secret: bytes = NO_SECRET) -> InprocConnection:
        return await self.peers.wait_for(peer_name, timeout_s, secret)

    def stats(self) -> TransportStats:
        return self.counters.snapshot(len(self.connections))

    async def close(self) -> None:
        self._closed = True
        self.network.leave(self)
        self.peers.close()
        for connection in list(self.connections):
            await connection.close()


class InprocConnection:
    """One end of a connection. See `base.Connection`."""

    def __init__(self, endpoint: InprocEndpoint, peer_name: str) -> None:
        self.other: InprocConnection = self  # until `connect` joins the two ends
        self.receives = MatchList()
        self._endpoint = endpoint
        self._peer_name = peer_name
        self._alive = True
        self._carrying: set[asyncio.Task[None]] = set()  # messages from this end to the other
        self._gone = asyncio.Event()

    @property
    def peer_name(self) -> str:
        return self._peer_name

    @property
    def lane(self) -> str:
        return "inproc"

    @property
    def alive(self) -> bool:
        return self._alive

    async def send(self, tag: int, buffer: torch.Tensor) -> None:
        check_buffer(buffer)
        check_tag(tag)
        if not self._alive:
            raise PeerLost(f"the connection to {self._peer_name} is closed")
        fault = self._endpoint.network.fault_of(self._endpoint.name, self._peer_name, tag, buffer.numel())
        task = asyncio.create_task(self._carry(tag, buffer, fault))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        done, _ = await asyncio.wait({task})
        if any(one.cancelled() for one in done):
            raise PeerLost(f"the connection to {self._peer_name} was lost")
        task.result()
        self._endpoint.counters.sent(buffer.numel())

    def post_receive(self, tag: int, buffer: torch.Tensor) -> Receive:
        if not self._alive:
            raise PeerLost(f"the connection to {self._peer_name} is closed")
        return self.receives.post(tag, buffer)

    async def close(self) -> None:
        self._lose()
        await self.drained()

    async def drained(self) -> None:
        await self._gone.wait()
        while carrying := self._carrying | self.other._carrying:
            await asyncio.wait(carrying)

    def _lose(self) -> None:
        for end in (self, self.other):
            if not end._alive:
                continue
            end._alive = False
            end._endpoint.connections.discard(end)
            end._endpoint.peers.left(end)
            end.receives.fail_all(PeerLost(f"the connection to {end._peer_name} was lost"))
            for task in end._carrying:
                task.cancel()
            end._gone.set()

    async def _carry(self, tag: int, buffer: torch.Tensor, fault: Fault) -> None:
        """Take one message to the other end: match it, check its length, and only then write."""
        await asyncio.sleep(0)
        if fault.hold is not None:
            await fault.hold.wait()
        there = self.other
        receive = there.receives.take(tag)
        if receive is None:
            there._endpoint.counters.stale_messages += 1
            return
        source = _faulty(buffer, fault)
        if source.numel() != receive.buffer.numel():
            receive.fail(Truncated(f"{source.numel()} bytes for a receive of {receive.buffer.numel()}"))
            return
        receive.begin()
        try:
            await self._copy(source, receive.buffer, fault)
        except asyncio.CancelledError:
            receive.fail(PeerLost(f"the connection to {there._peer_name} was lost"))
            raise
        receive.complete()
        there._endpoint.counters.received(source.numel())

    async def _copy(self, source: torch.Tensor, target: torch.Tensor, fault: Fault) -> None:
        half = source.numel() // 2
        await _copy_range(source, target, 0, half)
        if fault.stall is not None:
            await fault.stall.wait()
        if fault.lose_connection:
            self._lose()
        await asyncio.sleep(0)
        await _copy_range(source, target, half, source.numel())


async def _copy_range(source: torch.Tensor, target: torch.Tensor, begin: int, end: int) -> None:
    for start in range(begin, end, CHUNK_BYTES):
        stop = min(end, start + CHUNK_BYTES)
        target[start:stop].copy_(source[start:stop])
        await asyncio.sleep(0)


def _faulty(buffer: torch.Tensor, fault: Fault) -> torch.Tensor:
    """The bytes as they arrive."""
    if fault.resize_bytes is None and fault.flip_byte is None:
        return buffer
    size = buffer.numel() if fault.resize_bytes is None else fault.resize_bytes
    arriving = buffer.new_zeros(size)
    kept = min(size, buffer.numel())
    arriving[:kept] = buffer[:kept]
    if fault.flip_byte is not None:
        arriving[fault.flip_byte] ^= 0xFF
    return arriving
