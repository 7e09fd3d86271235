"""How much of a kind a message from a peer may hold, in one place: checked before anything walks it. Pure.

The bounds of sampling fields are in `common.sampling.limits`, those of clients' texts in the router's validation. Text
that a peer only says to be logged (reasons, details) has no bound but the message's.
"""

from __future__ import annotations

from typing import Final

from common.errors import InvalidArgument

MAX_RANKS: Final = 64  # of a worker: rank_addresses, rank_peer_names, legs' ends
MAX_NAME_CHARS: Final = 256  # of workers, incarnations, ranks, sessions, fingerprints
MAX_ADDRESS_CHARS: Final = 512  # host:port, or a transport's URL


def check_count(field: str, count: int, most: int, least: int = 0) -> None:
    """Raises `InvalidArgument` naming the field and how many entries it has."""
    if not least <= count <= most:
        raise InvalidArgument(field, count, f"{least} to {most} entries")


def check_chars(field: str, text: str, most: int, least: int = 1) -> None:
    """Raises `InvalidArgument` naming the field, and its length if it is too long."""
    if not least <= len(text) <= most:
        shown = text if len(text) < least else f"{len(text)} characters"
        raise InvalidArgument(field, shown, f"{least} to {most} characters")
