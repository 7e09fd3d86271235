"""`nccl://host:port`: bytes through NCCL from GPU to GPU, matched by tag over a TCP connection beside it.

Every connection has a communicator of its own, so that it can be aborted without touching another. Nothing waits inside
NCCL for a peer that may never send: what has not matched does not reach it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from urllib.parse import urlsplit

import torch

from common.errors import BatonError, FailedPrecondition, InvalidArgument, PeerLost, TransferTimeout, Unavailable
from common.transport.base import TransportStats
from common.transport.counters import Counters
from common.transport.greetings import HELLO_TIMEOUT_S, Greetings
from common.transport.hello import HELLO_BYTES, Hello, decode_hello
from common.transport.nccl_communicator import CommunicatorOpener, NcclOpener
from common.transport.nccl_connection import NcclConnection
from common.transport.nccl_library import UNIQUE_ID_BYTES
from common.transport.pair_secret import NO_SECRET
from common.transport.peers import PeerBook, check_peer_name
from common.transport.side_channel import SideChannel

OPEN_TIMEOUT_S = 30.0  # for the communicator of a peer that connects to us
_LEADER = 0
_FOLLOWER = 1


class NcclEndpoint:
    """Made by `open`. See `base.Endpoint`."""

    def __init__(self, name: str, device: torch.device, opener: CommunicatorOpener) -> None:
        check_peer_name(name)
        self._name = name
        self._device = device
        self._opener = opener
        self._counters = Counters()
        self._connections: set[NcclConnection] = set()
        self._peers: PeerBook[NcclConnection] = PeerBook()
        self._greetings = Greetings()
        self._draining: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._address = ""
        self._closed = False

    @classmethod
    async def open(
        cls,
        url: str,
        name: str,
        device: torch.device,
        opener: CommunicatorOpener | None = None,
        listens: bool = True,
    ) -> NcclEndpoint:
        """For transfers from and to `device`; listens at `url`, or is only ready to connect.

        Raises `InvalidArgument`, `Unavailable` (the port is taken) or `FailedPrecondition` (no NCCL, no GPU).
        """
        host, port = parse_nccl_url(url)
        made = cls(name, device, NcclOpener(device) if opener is None else opener)
        if not listens:
            return made
        try:
            made._server = await asyncio.start_server(made._on_connect, host, port)
        except OSError as error:
            raise Unavailable(f"cannot listen on {url}: {error}") from error
        made._address = f"nccl://{host}:{made._server.sockets[0].getsockname()[1]}"
        return made

    @property
    def address(self) -> str:
        return self._address

    async def connect(self, address: str, timeout_s: float, secret: bytes = NO_SECRET) -> NcclConnection:
        if self._closed:
            raise FailedPrecondition("the transport endpoint is closed")
        host, port = parse_nccl_url(address)
        try:
            async with asyncio.timeout(timeout_s):
                channel = SideChannel(*await asyncio.open_connection(host, port))
                connection, _ = await self._greet(channel, leads=False, timeout_s=timeout_s, secret=secret)
                return connection
        except TimeoutError as error:
            raise TransferTimeout(f"{address} did not answer within {timeout_s} s") from error
        except (FailedPrecondition, OSError) as error:
            raise PeerLost(f"cannot connect to {address}: {error}") from error

    async def wait_for_peer(self, peer_name: str, timeout_s: float, secret: bytes = NO_SECRET) -> NcclConnection:
        return await self._peers.wait_for(peer_name, timeout_s, secret)

    def stats(self) -> TransportStats:
        return self._counters.snapshot(len(self._connections))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._server is not None:
            self._server.close()
        self._peers.close()
        await self._greetings.close()
        for connection in list(self._connections):
            await connection.close()
        await asyncio.gather(*self._draining, return_exceptions=True)

    def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._greetings.start(self._accept(SideChannel(reader, writer)))

    async def _accept(self, channel: SideChannel) -> None:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                connection, secret = await self._greet(channel, leads=True, timeout_s=OPEN_TIMEOUT_S)
        except (BatonError, TimeoutError):
            return  # whoever it was sees its connection closed
        crowded_out = self._peers.arrived(connection, secret)
        if crowded_out is not None:
            await crowded_out.close()

    async def _greet(
        self, channel: SideChannel, leads: bool, timeout_s: float, secret: bytes = NO_SECRET
    ) -> tuple[NcclConnection, bytes]:
        """Exchange hellos and open a communicator; returns the other end's secret as well. The channel is closed if
        that fails, or is cancelled."""
        try:
            async with asyncio.timeout(min(timeout_s, HELLO_TIMEOUT_S)):
                peer, unique_id = await self._exchange_hellos(channel, leads, secret)
            communicator = await self._opener.open(unique_id, _LEADER if leads else _FOLLOWER, timeout_s)
        except BaseException:
            channel.close()
            raise
        connection = NcclConnection(channel, communicator, peer.name, leads, self._device, self._counters, self._left)
        self._connections.add(connection)
        return connection, peer.secret

    async def _exchange_hellos(self, channel: SideChannel, leads: bool, secret: bytes) -> tuple[Hello, bytes]:
        """The other end's, and the unique id of the communicator."""
        hello = Hello(self._name, 0, secret).encode()  # tags are matched per connection and need no key
        if leads:
            peer = decode_hello(await channel.read(HELLO_BYTES))
            unique_id = await channel.read(UNIQUE_ID_BYTES)
            channel.write(hello)
            return peer, unique_id
        unique_id = self._opener.unique_id()
        channel.write(hello)
        channel.write(unique_id)
        return decode_hello(await channel.read(HELLO_BYTES)), unique_id

    def _left(self, connection: NcclConnection) -> None:
        self._connections.discard(connection)
        self._peers.left(connection)
        _start(connection.drained(), self._draining)


def _start(work: Coroutine[None, None, None], tasks: set[asyncio.Task[None]]) -> None:
    """A task that is in `tasks` until it is over."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def parse_nccl_url(url: str) -> tuple[str, int]:
    """Host and port of `nccl://host:port`. Raises `InvalidArgument`."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "nccl" or not parts.hostname or port is None or parts.path:
        raise InvalidArgument("url", url, "nccl://host:port, port 0 for any")
    return parts.hostname, port
