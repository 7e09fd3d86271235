"""The 64 bytes in front of a slot's payload: what they say, and whether they say what was granted.

    little-endian: magic 8s | version u32 | 0 u32 | tag u64 | payload bytes u64 | digest u64 | zeros

Bytes in, numbers out; knows no tensors.
"""

from __future__ import annotations

import struct
from typing import Final

from common.errors import DigestMismatch, Truncated
from common.kvcache.layout import HEADER_BYTES

PAYLOAD_VERSION: Final = 1
DIGEST_OFFSET: Final = 32
_MAGIC: Final = b"BATON-KV"
_HEADER: Final = struct.Struct("<8sIIQQQ")


def encode_header(tag: int, payload_bytes: int, digest: int) -> bytearray:
    """HEADER_BYTES bytes. `digest` is 0 where a device fills it in later."""
    header = _HEADER.pack(_MAGIC, PAYLOAD_VERSION, 0, tag, payload_bytes, digest)
    return bytearray(header.ljust(HEADER_BYTES, b"\0"))


def checked_digest(header: bytes, expected_tag: int, payload_bytes: int) -> int:
    """The digest that the sender computed. Raises `DigestMismatch` or `Truncated` if the header is not as granted."""
    magic, version, _, tag, num_bytes, digest = _HEADER.unpack_from(header)
    if magic != _MAGIC or version != PAYLOAD_VERSION:
        raise DigestMismatch(
            f"the slot starts with {header[:12].hex()}, which is no KV payload of version {PAYLOAD_VERSION}"
        )
    if tag != expected_tag:
        raise DigestMismatch(f"the payload carries tag {tag:016x}, expected {expected_tag:016x}")
    if num_bytes != payload_bytes:
        raise Truncated(f"the header announces {num_bytes} bytes, {payload_bytes} were expected")
    assert isinstance(digest, int)
    return digest


def check_digest(actual: int, announced: int) -> None:
    """Raise `DigestMismatch` unless the payload's digest is the header's."""
    if actual != announced:
        raise DigestMismatch(f"payload digest {actual:016x}, the header says {announced:016x}")
