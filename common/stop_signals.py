"""SIGTERM and SIGINT: the first asks a process to finish what is under way and end, the same once more to hurry.

The same: Ctrl-C in a terminal reaches a whole process group, and a parent in it may pass it on as SIGTERM. The death
of a parent, however often the kernel tells of it, asks and never hurries.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from common.parent_death import PARENT_GONE


class StopSignals:
    """Takes these signals of the process for the running loop."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.hurrying = asyncio.Event()
        self._taken: set[int] = set()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, number)
        loop.add_signal_handler(PARENT_GONE, self.stopping.set)

    def _take(self, number: int) -> None:
        (self.hurrying if number in self._taken else self.stopping).set()
        self._taken.add(number)

    async def unless_hurried(self, work: Coroutine[Any, Any, object]) -> bool:
        """Run what takes its time, such as draining; a signal to hurry cancels it. Returns whether it ended itself."""
        working = asyncio.create_task(work)
        hurrying = asyncio.create_task(self.hurrying.wait())
        try:
            await asyncio.wait({working, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            has_ended = working.done()
            if has_ended:
                working.result()
            return has_ended
        finally:
            working.cancel()
            hurrying.cancel()
            await asyncio.wait({working, hurrying})
