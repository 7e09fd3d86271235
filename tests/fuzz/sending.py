"""Sends one input to one port: a call with made requests, or a connection that says anything, nothing, or vanishes.

Whatever comes back is right here; what the deployment does afterwards is judged elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Literal

import grpc

from services.router.cancellation import is_being_cancelled
from tests.fuzz.http2 import BytesMaker
from tests.fuzz.messages import METHODS, MessageMaker, Names

CALL_S: Final = 0.25  # of a call, at most
CONNECT_S: Final = 2.0
TOO_LONG_S: Final = 20.0
_READ_BYTES: Final = 1 << 16
_CALLS_PER_CHANNEL: Final = 200


@dataclass(frozen=True, slots=True)
class Port:
    """Where inputs are sent. `service` is the process it belongs to; `speaks` what it expects."""

    service: Literal["router", "prefill", "decode"]
    speaks: Literal["grpc", "http", "other"]
    number: int


@dataclass(slots=True)
class _Channel:
    """Used for some calls, then closed when the last of them is over."""

    channel: grpc.aio.Channel
    num_calls: int = 0
    num_running: int = 0


class Sender:
    """Sends inputs to the ports of one deployment. Use `open` as a context."""

    def __init__(self, ports: list[Port], names: Names, seed: int) -> None:
        self.ports = ports
        self._names = names
        self._seed = seed
        self._channels: dict[int, _Channel] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Sender]:
        """Closes its channels in the end."""
        try:
            yield self
        finally:
            for used in self._channels.values():
                await used.channel.close()

    async def send(self, index: int) -> str:
        """Send the input with this number; what kind it was. Raises `TimeoutError` if that took too long."""
        async with asyncio.timeout(TOO_LONG_S):
            return await self._send(index)

    async def _send(self, index: int) -> str:
        rng = random.Random(f"{self._seed}:{index}")
        (port,) = rng.choices(self.ports, [8 if port.speaks == "grpc" else 1 for port in self.ports])
        if port.speaks == "grpc" and rng.random() < 0.65:
            await self._call(rng, port)
            return f"{port.service} calls"
        await self._connect(rng, port)
        return f"{port.service} {port.speaks} connections"

    async def _call(self, rng: random.Random, port: Port) -> None:
        method = rng.choice(METHODS[port.service])
        requests = MessageMaker(rng, self._names).call(method)
        reads, is_abandoned = rng.choice((0, 1, 3)), rng.random() < 0.5
        async with self._channel(port) as channel:
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(method.path)(
                timeout=rng.choice((0.02, CALL_S))
            )
            try:
                await _talk(call, requests, is_abandoned, reads)
            except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
                pass  # it was refused, or is over
            except asyncio.CancelledError:
                if is_being_cancelled():
                    raise
            finally:
                call.cancel()

    @contextlib.asynccontextmanager
    async def _channel(self, port: Port) -> AsyncIterator[grpc.aio.Channel]:
        used = self._channels.get(port.number)
        if used is None or used.num_calls >= _CALLS_PER_CHANNEL:
            address, options = f"127.0.0.1:{port.number}", [("grpc.use_local_subchannel_pool", 1)]
            used = self._channels[port.number] = _Channel(grpc.aio.insecure_channel(address, options=options))
        used.num_calls += 1
        used.num_running += 1
        try:
            yield used.channel
        finally:
            used.num_running -= 1
            if not used.num_running and self._channels[port.number] is not used:
                await used.channel.close()

    async def _connect(self, rng: random.Random, port: Port) -> None:
        maker = BytesMaker(rng)
        said = {"grpc": maker.connection, "http": maker.http1, "other": maker.noise}[port.speaks]()
        silence, cut, ending = rng.random(), rng.random(), rng.choice(("close", "vanish", "half", "stay"))
        if silence < 0.1:
            said = b""
        elif cut < 0.2:
            said = said[: rng.randrange(len(said) + 1)]
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", port.number)
                try:
                    writer.write(said)
                    if rng.random() < 0.7:
                        await writer.drain()
                        async with asyncio.timeout(0.05):
                            await reader.read(_READ_BYTES)
                    if ending == "half" and writer.can_write_eof():
                        writer.write_eof()
                    if ending in ("half", "stay"):
                        await asyncio.sleep(rng.uniform(0.0, 0.5))  # says nothing and reads nothing meanwhile
                finally:
                    _close(writer, vanishes=ending == "vanish")


async def _talk(
    call: grpc.aio.StreamStreamCall[bytes, bytes], requests: list[bytes], is_abandoned: bool, num_reads: int
) -> None:
    for request in requests:
        await call.write(request)
    if not is_abandoned:
        await call.done_writing()
    for _ in range(num_reads):
        if await call.read() is grpc.aio.EOF:
            break


def _close(writer: asyncio.StreamWriter, vanishes: bool) -> None:
    if vanishes:
        # Reset instead of FIN, as of a process that is gone with bytes unread.
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
