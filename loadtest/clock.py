"""The clock that requests are sent by: monotonic, shared by all processes of the machine, and slept on precisely.

The event loop rounds its waits up to whole milliseconds, so the last millisecond before a request is due is spent
looking at the clock, while the loop goes on handling what arrives.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

_SPIN_S = 0.0012  # the loop's millisecond, and what the kernel adds to it


class Clock(Protocol):
    """Seconds that only grow. Tests bring one that they control."""

    def now_s(self) -> float:
        """Now."""

    async def sleep_until(self, at_s: float) -> None:
        """Return at `at_s`, or at once if that is past. Cancelling it leaves nothing behind."""


class MonotonicClock:
    """The system's monotonic clock."""

    def now_s(self) -> float:
        """Seconds since the machine was started."""
        return time.monotonic()

    async def sleep_until(self, at_s: float) -> None:
        """Return within some hundredths of a millisecond after `at_s`, if the event loop is not busy."""
        if (coarse_s := at_s - time.monotonic() - _SPIN_S) > 0:
            await asyncio.sleep(coarse_s)
        while time.monotonic() < at_s:  # noqa: ASYNC110  there is no event to wait for, only the time
            await asyncio.sleep(0)
