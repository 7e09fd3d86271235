"""Those who have connected and not said who they are: a bounded number, each for a bounded time. Knows no wire."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Final

MAX_GREETINGS: Final = 64
HELLO_TIMEOUT_S: Final = 5.0


class Greetings:
    """Tasks that greet. One too many ends the oldest: a peer says its hello at once, and strangers may never."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, greeting: Coroutine[None, None, None]) -> None:
        """`greeting` closes its connection if it is cancelled."""
        task = asyncio.get_running_loop().create_task(greeting)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        if len(self._tasks) > MAX_GREETINGS:
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()

    async def close(self) -> None:
        """End all of them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
