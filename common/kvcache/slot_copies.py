"""Gathers and scatters of one storage, one after the other, beside the event loop of the transport.

On a CPU a copy is work for a thread. On a GPU it is work for the device, and what it costs the host is its launch: that
is done here and now, as crossing to a thread that competes for the interpreter took longer than the launch itself, and
the loop's watch looks whether the device is done. Knows no slots' owners and no transport.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from common.kvcache.device_queue import DeviceWork
from common.short_sleep import Look, LoopWatch, loop_watch

Start = Callable[[], DeviceWork | None]


class SlotCopies:
    """Belongs to the loop on which it is made. `close` before the storage goes."""

    def __init__(self, device: torch.device, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._executor: ThreadPoolExecutor | None = None
        self._watch: LoopWatch | None = None
        if device.type == "cpu":
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        else:
            self._watch = loop_watch()
        self._under_way: deque[tuple[DeviceWork, asyncio.Future[None]]] = deque()

    def run(self, start: Start) -> asyncio.Future[None]:
        """Queue one copy. The future is done when its bytes are in place, or fails as `start` or the copy did.

        `start` queues the copy on the device, or returns None if there is nothing to do; on a CPU it runs in a thread.
        Cancelling the future does not stop the copy: whoever lends memory to it waits for the future, shielded.
        """
        if self._watch is None:
            return self._loop.run_in_executor(self._executor, _run, start)
        future: asyncio.Future[None] = self._loop.create_future()
        try:
            work = start()
        except Exception as error:  # handed to whoever awaits, as a thread would
            future.set_exception(error)
            return future
        if work is None:
            future.set_result(None)
        elif work.done() and not self._under_way:
            _finish(work, future)
        else:
            self._under_way.append((work, future))
            self._watch.add(self._look)
        return future

    def close(self) -> None:
        """Wait for what is under way; what has not begun in a thread never will."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        while self._under_way:
            work, future = self._under_way.popleft()
            work.wait()
            _finish(work, future)

    def _look(self) -> Look:
        """Copies end in the order in which they were queued."""
        num_before = len(self._under_way)
        while self._under_way and self._under_way[0][0].done():
            _finish(*self._under_way.popleft())
        if not self._under_way:
            return Look.OVER
        return Look.STILL if len(self._under_way) == num_before else Look.MOVED


def _run(start: Start) -> None:
    work = start()
    if work is not None:
        work.wait()
        work.result()


def _finish(work: DeviceWork, future: asyncio.Future[None]) -> None:
    """The future ends as the work did, unless nobody waits any more."""
    try:
        work.result()
    except Exception as error:  # handed to whoever awaits, as a thread would
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(None)
