"""Small control frames between two connected ranks, beside a wire that carries bytes but no tags: `nccl_connection`.

    frame: kind u8 | number u64 | tag u64 | bytes u64

`number` counts the messages of one sender. Knows sockets, but not what the frames bring about.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from dataclasses import dataclass
from typing import Final

from common.errors import FailedPrecondition, PeerLost

_FRAME: Final = struct.Struct("<BQQQ")
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))


class FrameKind(enum.IntEnum):
    """What a frame says; who may say it is drawn in `nccl_connection`."""

    ANNOUNCE = 1  # I have a message of this tag and size
    DROP = 2  # nothing here wants your message: it is over
    READY = 3  # your message has its receive: let it come when you like
    SEND = 4  # send your message now
    RECEIVE = 5  # receive my message now


@dataclass(frozen=True, slots=True)
class Frame:
    """One control message."""

    kind: FrameKind
    number: int
    tag: int = 0
    num_bytes: int = 0


class SideChannel:
    """Frames in order over one TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanishes says no goodbye
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def write(self, data: bytes | bytearray) -> None:
        """Put raw bytes on the wire: a hello."""
        self._writer.write(data)

    async def read(self, num_bytes: int) -> bytes:
        """The next raw bytes. Raises `PeerLost` at the end of the stream."""
        try:
            return await self._reader.readexactly(num_bytes)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise PeerLost("the other end closed its side channel") from error

    def send(self, frame: Frame) -> None:
        self._writer.write(_FRAME.pack(frame.kind, frame.number, frame.tag, frame.num_bytes))

    async def receive(self) -> Frame:
        """Raises `PeerLost` at the end of the stream, `FailedPrecondition` for a frame of another protocol."""
        kind, number, tag, num_bytes = _FRAME.unpack(await self.read(_FRAME.size))
        try:
            return Frame(FrameKind(kind), number, tag, num_bytes)
        except ValueError as error:
            raise FailedPrecondition(f"there is no control frame of kind {kind}") from error

    def close(self) -> None:
        """Idempotent; the other end sees the end of the stream."""
        self._writer.close()
