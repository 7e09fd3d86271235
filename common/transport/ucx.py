"""`ucx://host:port` over `ucxx`: tcp between CPUs, cuda_ipc and RDMA between GPUs (`ucx_lane` says which).

Receives are driven by probing. Nothing is posted to UCX until a message is there with its tag and length: then it is
received into its slot, or consumed without moving a byte if it is stale or of the wrong size (UCX releases the sender
of a rendezvous that does not fit). So taking back an unmatched receive is certain and immediate, which cancelling a
posted UCX receive is not; and a large message costs no extra round trip, as its rendezvous waits for us anyway.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from urllib.parse import urlsplit

import torch
from ucxx._lib.arr import Array
from ucxx._lib.libucxx import TagProbeResult, UCXEndpoint, UCXError, UCXListener, UCXUnreachableError

from common.errors import BatonError, FailedPrecondition, InvalidArgument, PeerLost, TransferTimeout, Unavailable
from common.transport.base import TransportStats
from common.transport.counters import Counters
from common.transport.cuda_device import attached_cuda_device
from common.transport.greetings import HELLO_TIMEOUT_S, Greetings
from common.transport.hello import HELLO_BYTES, Hello, decode_hello
from common.transport.listening_address import confine_listener
from common.transport.pair_secret import NO_SECRET
from common.transport.peers import PeerBook, check_peer_name
from common.transport.ucx_connection import UcxConnection
from common.transport.ucx_devices import device_options
from common.transport.ucx_worker import LoopWorker, Progress

_log = logging.getLogger(__name__)
ANY_ADDRESS = "0.0.0.0"


class UcxEndpoint:
    """A UCX context and worker of its own, and a listener on `host` unless it only connects (`listens` is false).

    0.0.0.0 is every IPv4 address of this machine. With a loopback host nothing of UCX touches the network; else its
    data connections may take every device of UCX_NET_DEVICES, on which UCX listens for them too.

    `memory` is where this rank's buffers live, `host`, `cuda` or `cuda:N`: the lane of a connection is that of this
    memory. On a GPU use `Progress.POLLING`: what ends a copy there raises no event. Raises `FailedPrecondition` without
    a GPU.
    """

    def __init__(
        self,
        url: str,
        name: str,
        progress: Progress = Progress.EVENT,
        memory: str = "host",
        listens: bool = True,
    ) -> None:
        check_peer_name(name)
        host, port = parse_ucx_url(url)
        own_address = _own_address(url, host)
        self._name = name
        # Before UCX opens: it looks for the GPU that is current in this thread.
        self._device = torch.device("cpu") if memory == "host" else attached_cuda_device(memory)
        self._worker = LoopWorker(progress, self._on_message, device_options(own_address))
        self._connections: set[UcxConnection] = set()
        self._peers: PeerBook[UcxConnection] = PeerBook()
        self._greetings = Greetings()
        self._counters = Counters()
        self._closed = False
        self._listener: UCXListener | None = None
        self._address = ""
        if listens:
            self._listener = self._listen(url, own_address, port)
            self._address = f"ucx://{host}:{self._listener.port}"

    @property
    def address(self) -> str:
        return self._address

    async def connect(self, address: str, timeout_s: float, secret: bytes = NO_SECRET) -> UcxConnection:
        if self._closed:
            raise FailedPrecondition("the transport endpoint is closed")
        try:
            async with asyncio.timeout(timeout_s):
                host, port = parse_ucx_url(address)
                endpoint = UCXEndpoint.create(self._worker.ucx, await _resolve(host), port, True)
                connection, _ = await self._greet(endpoint, secret)
                return connection
        except TimeoutError as error:
            raise TransferTimeout(f"{address} did not answer within {timeout_s} s") from error
        except UCXUnreachableError as error:
            devices = ", ".join(self._worker.devices)
            raise PeerLost(f"cannot connect to {address}: {error} over {devices}, which UCX uses here") from error
        except (UCXError, FailedPrecondition, OSError) as error:
            raise PeerLost(f"cannot connect to {address}: {error}") from error

    async def wait_for_peer(self, peer_name: str, timeout_s: float, secret: bytes = NO_SECRET) -> UcxConnection:
        return await self._peers.wait_for(peer_name, timeout_s, secret)

    def stats(self) -> TransportStats:
        return self._counters.snapshot(len(self._connections))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._listener = None
        self._peers.close()
        await self._greetings.close()
        for connection in list(self._connections):
            await connection.close()
        self._worker.close()

    def _listen(self, url: str, own_address: str, port: int) -> UCXListener:
        """`ucxx` listens on every address: what comes to others is kept out. Raises `Unavailable`."""
        try:
            listener = UCXListener.create(self._worker.ucx, port, self._on_connect, deliver_endpoint=True)
        except UCXError as error:
            self._worker.close()
            raise Unavailable(f"cannot listen on {url}: {error}") from error
        if own_address != ANY_ADDRESS and not confine_listener(listener.port, own_address):
            _log.warning("%s listens on all addresses: this kernel takes no socket filter", url)
        return listener

    def _on_message(self, message: TagProbeResult) -> None:
        if any(connection.offer(message) for connection in self._connections):
            return
        self._counters.stale_messages += 1
        self._worker.discard(message)

    def _on_connect(self, endpoint: UCXEndpoint) -> None:
        """Called by UCX while it progresses."""
        if not self._closed:
            self._greetings.start(self._accept(endpoint))

    async def _accept(self, endpoint: UCXEndpoint) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                connection, secret = await self._greet(endpoint, NO_SECRET)
        except (UCXError, BatonError, TimeoutError):
            return  # whoever it was sees its connection closed
        crowded_out = self._peers.arrived(connection, secret)
        if crowded_out is not None:
            await crowded_out.close()

    async def _greet(self, endpoint: UCXEndpoint, secret: bytes) -> tuple[UcxConnection, bytes]:
        """Exchange hellos; returns the other end's secret as well. The endpoint is closed if that fails, or is
        cancelled. Raises `PeerLost`, `UCXError` or `FailedPrecondition`."""
        own_key = secrets.randbits(64)
        ours, theirs = Hello(self._name, own_key, secret).encode(), bytearray(HELLO_BYTES)
        try:
            sending, receiving = Array(ours), Array(theirs)
            sent = self._worker.finished(endpoint.stream_send(sending), (sending, ours))
            received = self._worker.finished(endpoint.stream_recv(receiving), (receiving, theirs))
            for error in (await sent, await received):
                if error is not None:
                    raise error
            hello = decode_hello(theirs)
            connection = UcxConnection(
                self._worker,
                endpoint,
                hello.name,
                own_key,
                hello.tag_key,
                self._device,
                self._counters,
                self._left,
            )
        except BaseException as error:
            endpoint.close_blocking()
            self._worker.kick()
            if isinstance(error, RuntimeError):  # ucxx's, of an endpoint whose peer has left
                raise PeerLost(str(error)) from error
            raise
        self._connections.add(connection)
        return connection, hello.secret

    def _left(self, connection: UcxConnection) -> None:
        self._connections.discard(connection)
        self._peers.left(connection)


def parse_ucx_url(url: str) -> tuple[str, int]:
    """Host and port of `ucx://host:port`. Raises `InvalidArgument`."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "ucx" or not parts.hostname or port is None or parts.path:
        raise InvalidArgument("url", url, "ucx://host:port, port 0 for any")
    return parts.hostname, port


def _own_address(url: str, host: str) -> str:
    """The IPv4 address of this machine that `host` names. Raises `InvalidArgument`."""
    try:
        return str(socket.getaddrinfo(host, None, family=socket.AF_INET)[0][4][0])
    except OSError as error:
        raise InvalidArgument("url", url, f"{host} has no IPv4 address: {error.strerror}") from error


async def _resolve(host: str) -> str:
    """An IPv4 address of the host; UCX takes no names."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET)
    return str(found[0][4][0])
