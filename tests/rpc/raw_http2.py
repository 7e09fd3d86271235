"""Bytes that no gRPC client would send: HTTP/2 frames made by hand, and what a server answers to them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4

Header = tuple[bytes, bytes]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame, whatever it holds."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def header_block(headers: Sequence[Header]) -> bytes:
    """HPACK literals without indexing or Huffman code; names and values are any bytes, up to 126 of each."""
    return b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers)


def call_headers(path: bytes, *more: Header) -> bytes:
    """The header block of a gRPC call."""
    return header_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *more,
        ]
    )


def grpc_message(payload: bytes) -> bytes:
    """A message as it stands in DATA frames: not compressed, its length, its bytes."""
    return struct.pack(">BI", 0, len(payload)) + payload


def call_frames(stream_id: int, path: bytes, payload: bytes, *more: Header) -> bytes:
    """A whole unary call, with up to 16 KiB of message."""
    return frame(HEADERS, END_HEADERS, stream_id, call_headers(path, *more)) + frame(
        DATA, END_STREAM, stream_id, grpc_message(payload)
    )


async def exchange(port: int, sent: bytes, until: bytes, timeout_s: float = 20.0) -> bytes:
    """Connect, send the preface, SETTINGS and `sent`, and return what comes up to `until`, or to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + sent)
        async with asyncio.timeout(timeout_s):
            return await _read_until(reader, until)
    finally:
        writer.close()


async def _read_until(reader: asyncio.StreamReader, until: bytes) -> bytes:
    received = b""
    while until not in received:
        more = await reader.read(1 << 16)
        if not more:
            break
        received += more
    return received
