"""How far the steps of a rank have come: which layers have stored the K and V of a step's tokens.

The step thread tells (`begin`, `stored`, `end`), another thread's event loop waits (`reached`). On a GPU a step runs
long after it was launched: what is noted then are events on its stream, and a thread of this module sleeps on those
that somebody waits for, so that nobody looks again and again. A step that is replayed from a graph tells of no layer:
all are stored at its end. Steps pass in the order of their ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch

_log = logging.getLogger(__name__)
_MAX_WAITS: Final = 1 << 14  # for stored layers, at once
_KEPT_STEPS: Final = 8  # more than a front plans ahead; older ones are over


@dataclass(slots=True, eq=False)
class _Step:
    step_id: int
    num_layers: int = 0  # that have stored, or on a GPU were launched
    events: list[torch.cuda.Event] = field(default_factory=list)  # on a GPU: one a layer, or one at the end
    over: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    step_id: int
    num_layers: int
    done: Callable[[], None]  # from any thread


class StepMarks:
    """Belongs to one rank. Whoever waits has a deadline of his own."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._steps: deque[_Step] = deque(maxlen=_KEPT_STEPS)
        self._waits: list[_Wait] = []
        self._sleeper: _EventSleeper | None = _EventSleeper() if device.type == "cuda" else None

    def begin(self, step_id: int) -> None:
        """What is stored from now on is of this step."""
        with self._lock:
            self._steps.append(_Step(step_id))

    def stored(self) -> None:
        """The next layer of the step has stored the K and V of all of its tokens (on a GPU: that was launched)."""
        with self._lock:
            self._steps[-1].num_layers += 1
            self._note(self._steps[-1])
            self._settle()

    def end(self) -> None:
        """Nothing more will be stored by the step (on a GPU: launched), whatever came of it."""
        with self._lock:
            step = self._steps[-1]
            step.over = True
            if not step.events:
                self._note(step)
            self._settle()

    async def reached(self, step_id: int, num_layers: int) -> None:
        """Wait until the step's first `num_layers` >= 1 layers have stored. For a step not begun yet, that too."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_finish, future)

        wait = _Wait(step_id, num_layers, done)
        with self._lock:
            self._waits.append(wait)
            self._settle()
        try:
            await future
        finally:
            with self._lock:
                if wait in self._waits:
                    self._waits.remove(wait)

    def close(self) -> None:
        """End the thread, once the events are over that it sleeps on."""
        if self._sleeper is not None:
            self._sleeper.close()

    def _note(self, step: _Step) -> None:
        """What was launched so far is over when this event is."""
        if self._sleeper is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            step.events.append(event)

    def _settle(self) -> None:
        """Answer the waits whose step has come far enough. Called with the lock."""
        if self._waits:
            self._waits = [wait for wait in self._waits if not self._answer(wait)]

    def _answer(self, wait: _Wait) -> bool:
        step = next((step for step in self._steps if step.step_id == wait.step_id), None)
        if step is None:
            if not self._steps or self._steps[0].step_id <= wait.step_id:
                return False  # it has not begun
            wait.done()  # long over
        elif step.num_layers < wait.num_layers and not step.over:
            return False
        elif self._sleeper is not None and step.events:
            self._sleeper.put(step.events[min(wait.num_layers, len(step.events)) - 1], wait.done)
        else:
            wait.done()
        return True


class _EventSleeper:
    """A thread that sleeps on one event after the other; they pass in order, but for a wait that came late."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step-marks", daemon=True)
        self._thread.start()

    def put(self, event: torch.cuda.Event, done: Callable[[], None]) -> None:
        assert self._queue.qsize() < _MAX_WAITS, "there are fewer slots to send from"
        self._queue.put((event, done))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                event, done = item
                event.synchronize()
                done()
        except BaseException:  # the process edge: without this thread nothing is ever sent again
            _log.exception("the thread that waits for stored layers failed")
            os._exit(1)  # the front sees both channels close and replaces the worker's ranks


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
