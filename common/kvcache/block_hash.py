"""Chained hashes of KV blocks: one digest names a block's tokens and everything before them.

    h(-1) = H(salt)        h(i) = H(h(i-1), tokens of block i)

Two prompts share h(i) if and only if they share the salt and their first i+1 blocks of tokens. This module
knows neither where blocks live nor whether they are cached.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from common.errors import InvalidArgument

DIGEST_BYTES = 16
_TOKEN_BYTES = 4
_ROOT_PERSON = b"baton-kv-root"
_TENANT_PERSON = b"baton-tenant"


def tenant_salt(tenant: str, model_digest: bytes) -> bytes:
    """Salt under which one tenant's blocks of one model are hashed: tenants never see each other's blocks."""
    length = len(model_digest).to_bytes(4, "little")  # "a" + "bc" must not equal "ab" + "c"
    return blake2b(length + model_digest + tenant.encode(), digest_size=DIGEST_BYTES, person=_TENANT_PERSON).digest()


def root_hash(salt: bytes) -> bytes:
    """The parent of a sequence's first block."""
    return blake2b(salt, digest_size=DIGEST_BYTES, person=_ROOT_PERSON).digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block after `parent` (the hash of the block before it, or `root_hash`)."""
    return blake2b(parent + _pack(token_ids), digest_size=DIGEST_BYTES).digest()


def hash_blocks(token_ids: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """One digest per full block of `token_ids`; a partial last block has none."""
    if block_size < 1:
        raise InvalidArgument("block_size", block_size, "must be at least 1")
    packed = memoryview(_pack(token_ids))
    step = block_size * _TOKEN_BYTES
    parent = root_hash(salt)
    hashes = []
    for start in range(0, len(packed) - step + 1, step):
        parent = blake2b(parent + packed[start : start + step], digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)
    return hashes


def _pack(token_ids: Sequence[int]) -> bytes:
    """Little-endian uint32, so that a digest means the same on every host. An `array("I")` is copied as memory."""
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument("token_ids", "...", "must be integers in [0, 2**32)") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
