"""What two ranks know each other by. Pure, and without torch: fronts make the secrets, ranks say them."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

SECRET_BYTES: Final = 16
NO_SECRET: Final = bytes(SECRET_BYTES)  # a connection that nobody was told of


def pair_secret(key: bytes, handoff_address: str, rank_address: str) -> bytes:
    """The secret that our ranks say to one decode rank. `key` is random and never told.

    It is good for the decode worker and the rank that a ticket names, together: whoever makes up a ticket, and is told
    or dialled for it, learns nothing that another hand-off bears.
    """
    return blake2b(f"{handoff_address}\n{rank_address}".encode(), key=key, digest_size=SECRET_BYTES).digest()
