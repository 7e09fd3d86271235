"""The first bytes in both directions of a connection, of fixed size: who I am, what shows it, and the key of my tags.

    magic 4s │ version u16 │ name length u16 │ tag key u64 │ secret 16s │ name, zero-padded

It knows neither wires nor what is sent afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common.errors import FailedPrecondition
from common.transport.pair_secret import NO_SECRET, SECRET_BYTES
from common.transport.peers import MAX_PEER_NAME_BYTES

_MAGIC = b"BATN"
_VERSION = 2
_HEAD = struct.Struct(f"<4sHHQ{SECRET_BYTES}s")
HELLO_BYTES = _HEAD.size + MAX_PEER_NAME_BYTES


@dataclass(frozen=True, slots=True)
class Hello:
    """What one end tells the other."""

    name: str
    tag_key: int  # random, 64 bits: mixed into every tag that is sent to this end
    secret: bytes = NO_SECRET  # of the end that connects; SECRET_BYTES

    def encode(self) -> bytearray:
        name = self.name.encode()
        head = _HEAD.pack(_MAGIC, _VERSION, len(name), self.tag_key, self.secret)
        return bytearray(head + name).ljust(HELLO_BYTES, b"\0")


def decode_hello(frame: bytes | bytearray) -> Hello:
    """Raises `FailedPrecondition` if the other end does not speak our protocol."""
    if len(frame) != HELLO_BYTES:
        raise FailedPrecondition(f"a hello has {HELLO_BYTES} bytes, not {len(frame)}")
    magic, version, num_name_bytes, tag_key, secret = _HEAD.unpack_from(frame)
    if magic != _MAGIC or version != _VERSION or not 0 < num_name_bytes <= MAX_PEER_NAME_BYTES:
        raise FailedPrecondition(f"not a hello of transport protocol {_VERSION}: {bytes(frame[:8])!r}")
    name = bytes(frame[_HEAD.size : _HEAD.size + num_name_bytes])
    try:
        return Hello(name.decode(), tag_key, secret)
    except UnicodeDecodeError as error:
        raise FailedPrecondition("the peer's name is not UTF-8") from error
