"""Length-prefixed msgpack messages on a local socket, blocking and asyncio. Knows nothing of their meaning."""

import asyncio
import contextlib
import socket
import struct

import msgspec

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytes:
    """The message with its length in front. Raises `ValueError` above `MAX_FRAME_BYTES`."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class BlockingFrames:
    """Frames on a blocking socket, for the rank's compute thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: msgspec.Struct) -> None:
        """Send one message. Raises `OSError` if the other end is gone."""
        self._socket.sendall(encode_frame(message))

    def receive(self) -> bytes | None:
        """The next message's bytes, or None at the end of the stream."""
        header = self._read(_LENGTH.size)
        if header is None:
            return None
        (num_bytes,) = _LENGTH.unpack(header)
        return self._read(num_bytes)

    def _read(self, num_bytes: int) -> bytes | None:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        filled = 0
        while filled < num_bytes:
            try:
                got = self._socket.recv_into(view[filled:])
            except ConnectionError:  # the other end closed before it had read everything
                return None
            if got == 0:
                return None
            filled += got
        return bytes(buffer)


class AsyncFrames:
    """Frames on an asyncio stream. `receive` is for one task; `send` may be called from any on the same loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> "AsyncFrames":
        """Take over a connected socket."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
        return cls(reader, writer)

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message. The callers' own bounds (plans and transfers in flight) bound the buffer."""
        self._writer.write(encode_frame(message))

    async def receive(self) -> bytes | None:
        """The next message's bytes, or None at the end of the stream. Cancelling it loses the stream's framing."""
        try:
            (num_bytes,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return await self._reader.readexactly(num_bytes)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def begin_close(self) -> None:
        """Send what is queued, then close the stream; does not wait for it."""
        self._writer.close()

    async def close(self) -> None:
        """Close the stream and wait until it is closed, for which the other end must read what is queued or be gone."""
        self.begin_close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
