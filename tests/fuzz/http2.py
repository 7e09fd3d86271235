"""Bytes for a port that speaks HTTP/2, from a seed: other protocols, broken frames, broken headers, floods. Pure.

Frames after RFC 9113, headers as literals without indexing after RFC 7541.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1

_PATHS: Final = (
    b"/baton.v1.Inference/Generate",
    b"/baton.v1.Inference/GetModelInfo",
    b"/baton.v1.Prefill/Prefill",
    b"/baton.v1.Decode/Session",
    b"/baton.v1.Decode/Handoff",
    b"/baton.v1.Worker/WatchStatus",
    b"/grpc.health.v1.Health/Check",
)
_ODD_PATHS: Final = (b"/\xff\xfe", b"", b"/", b"x", b"/baton.v1.Inference/\xc3\x28", b"/" + b"a" * 9000, b"/\x00/\x00")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """One frame. `length` is what its header says, if not the truth."""
    said = len(payload) if length is None else length
    return said.to_bytes(3, "big") + bytes((kind & 0xFF, flags & 0xFF)) + stream.to_bytes(4, "big") + payload


def headers_block(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Header fields, each as a literal without indexing and with a new name."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def call_headers(path: bytes, timeout: bytes = b"200m") -> list[tuple[bytes, bytes]]:
    """What a gRPC client sends to begin a call."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"grpc-timeout", timeout),
    ]


def message(payload: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    """A gRPC message in its frame."""
    said = len(payload) if length is None else length
    return bytes((compressed & 0xFF,)) + said.to_bytes(4, "big") + payload


def opening() -> bytes:
    """What a client sends first."""
    return PREFACE + frame(SETTINGS, 0, 0)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    rest, written = len(text) - 127, bytearray((127,))
    while rest >= 128:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    written.append(rest)
    return bytes(written) + text


class BytesMaker:
    """Makes what one connection sends; the same generator makes the same bytes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._kinds: Sequence[Callable[[], bytes]] = (
            self._other_protocol,
            self._any_frames,
            self._odd_headers,
            self._odd_messages,
            self._damaged_call,
            self._resets,
            self._flood,
            self._endless_headers,
            self._no_window,
        )

    def connection(self) -> bytes:
        """All bytes of one connection."""
        return self._rng.choice(self._kinds)()

    def noise(self) -> bytes:
        """Bytes of no protocol."""
        return self._rng.randbytes(self._rng.choice((1, 8, 62, 138, 700)))

    def http1(self) -> bytes:
        """A request to an HTTP/1 port, more or less."""
        line = self._rng.choice(
            (b"GET /metrics HTTP/1.1\r\n", b"GET \xff HTTP/1.1\r\n", b"POST /metrics HTTP/1.1\r\n", b"")
        )
        header = self._rng.choice(
            (b"Host: x\r\n", b"X: " + b"a" * 70_000 + b"\r\n", b"Content-Length: -1\r\n", b"\xff\r\n")
        )
        return line + header * self._rng.choice((1, 1, 200)) + self._rng.choice((b"\r\n", b"", self.noise()))

    def _other_protocol(self) -> bytes:
        return self._rng.choice((self.noise(), self.http1(), b"\x16\x03\x01\x02\x00\x01" + self.noise(), PREFACE[:9]))

    def _any_frames(self) -> bytes:
        frames = [opening()]
        for _ in range(self._rng.randint(1, 20)):
            payload = self._rng.randbytes(self._rng.choice((0, 1, 4, 8, 40, 300)))
            length = None if self._rng.random() < 0.8 else self._rng.choice((0, 3, 16384, 16385, (1 << 24) - 1))
            stream = self._rng.choice((0, 1, 2, 3, 5, (1 << 31) - 1, 1 << 31 | 1))
            frames.append(frame(self._rng.randrange(13), self._rng.randrange(256), stream, payload, length))
        return b"".join(frames)

    def _odd_headers(self) -> bytes:
        headers = call_headers(self._rng.choice(_ODD_PATHS + _PATHS))
        for _ in range(self._rng.randint(0, 3)):
            odd = self._rng.choice(
                ((b":path", b"/x"), (b"", b""), (b"\xff", b"\xff"), (b"grpc-timeout", b"-1S"), (b"x-bin", b"***"))
            )
            headers.insert(self._rng.randrange(len(headers) + 1), odd)
        if self._rng.random() < 0.3:
            headers.pop(self._rng.randrange(len(headers)))
        return (
            opening()
            + frame(HEADERS, END_HEADERS, 1, headers_block(headers))
            + frame(DATA, END_STREAM, 1, message(b""))
        )

    def _odd_messages(self) -> bytes:
        sent = [opening(), frame(HEADERS, END_HEADERS, 1, headers_block(call_headers(self._rng.choice(_PATHS))))]
        for _ in range(self._rng.randint(1, 4)):
            length = self._rng.choice((None, None, 0, 1 << 20, (1 << 32) - 1))
            sent.append(frame(DATA, 0, 1, message(self.noise(), self._rng.choice((0, 0, 1, 255)), length)))
        return b"".join(sent)

    def _damaged_call(self) -> bytes:
        call = bytearray(
            opening()
            + frame(HEADERS, END_HEADERS, 1, headers_block(call_headers(self._rng.choice(_PATHS))))
            + frame(DATA, END_STREAM, 1, message(b"\x0a\x04fuzz"))
        )
        for _ in range(self._rng.randint(1, 5)):
            call[self._rng.randrange(len(call))] = self._rng.randrange(256)
        return bytes(call)

    def _resets(self) -> bytes:
        """Calls that are taken back at once."""
        block = headers_block(call_headers(self._rng.choice(_PATHS)))
        calls = (
            frame(HEADERS, END_HEADERS, 2 * index + 1, block)
            + frame(RST_STREAM, 0, 2 * index + 1, (8).to_bytes(4, "big"))
            for index in range(self._rng.randint(10, 100))
        )
        return opening() + b"".join(calls)

    def _flood(self) -> bytes:
        one = self._rng.choice(
            (
                frame(PING, 0, 0, b"baton!!!"),
                frame(SETTINGS, 0, 0, b"\x00\x04\x00\x00\xff\xff"),
                frame(PRIORITY, 0, 3, b"\x00" * 5),
            )
        )
        return opening() + one * self._rng.randint(100, 1000)

    def _endless_headers(self) -> bytes:
        piece = headers_block([(b"x", b"y" * 1000)])
        more = frame(CONTINUATION, 0, 1, piece) * self._rng.randint(1, 60)
        return opening() + frame(HEADERS, 0, 1, headers_block(call_headers(_PATHS[0]))) + more

    def _no_window(self) -> bytes:
        """A call whose caller lets nothing be sent to him."""
        no_window = frame(SETTINGS, 0, 0, b"\x00\x04\x00\x00\x00\x00")
        block = headers_block(call_headers(self._rng.choice(_PATHS), b"2S"))
        return PREFACE + no_window + frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, message(b""))
