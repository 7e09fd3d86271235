"""Work that a process cannot be without: its end is told to whoever runs it, never missed."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NoReturn

from common.errors import InternalError


async def for_good(work: Awaitable[object], name: str) -> NoReturn:
    """Await what goes on until it is cancelled. Raises what it raises, and `InternalError` if it just ends."""
    await work
    raise InternalError(f"{name} has ended, without a reason")
