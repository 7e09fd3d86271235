"""Looking at what raises no event, and sleeping for some microseconds in between: for threads that watch a GPU.

A thread that looks without a rest holds the interpreter, and one that wants it waits for up to
`sys.getswitchinterval()`: to give it up for less than the other thread takes to wake is not enough. So a `LoopWatch`
looks eagerly only for a short time after something has moved, sleeps a moment now and then even so, and after every
look as soon as it has had to wait for the interpreter itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

_PR_SET_TIMERSLACK: Final = 29
_SLACK_NS: Final = 1_000


class Look(enum.Enum):
    """What a look has found."""

    MOVED = "moved"  # whoever waited for it should run before anybody rests
    STILL = "still"  # look again
    OVER = "over"  # there is nothing to look at any more


@dataclass(frozen=True, slots=True)
class Patience:
    """How a watch rests between looks. A sleep lasts some microseconds longer than it is asked to."""

    eager_s: float = 300e-6  # after the last movement; NVLink copies 64 MiB in 180 µs
    bite_s: float = 60e-6  # an eager thread sleeps this often
    breath_s: float = 1e-6  # for this long: others take the interpreter meanwhile
    share: float = 1 / 8  # of the time in which nothing has moved, once that is `eager_s`
    longest_s: float = 50e-6
    late_s: float = 25e-6  # a sleep that ends this much later than others was kept from the interpreter
    courtesy_s: float = 300e-6  # for which a breath follows every look then

    def rest_s(self, still_s: float, awake_s: float, moved: bool, courteous: bool) -> float:
        """How long to sleep when nothing moved for `still_s` and the last sleep ended `awake_s` ago. 0: not at all."""
        if still_s >= self.eager_s:
            return max(self.breath_s, min(self.longest_s, still_s * self.share))
        bite_s = 0.0 if courteous else self.bite_s
        return self.breath_s if awake_s >= max(bite_s, 2 * self.bite_s if moved else 0.0) else 0.0


@dataclass(slots=True)
class WatchCounts:
    """What a watch has done since it was made."""

    num_turns: int = 0
    num_rests: int = 0
    looking_s: float = 0.0
    resting_s: float = 0.0


class LoopWatch:
    """Calls every look of one event loop in turn until it is over; everything else on the loop runs in between.

    All that is watched shares the rests. Made by `loop_watch`.
    """

    def __init__(self) -> None:
        allow_short_sleeps()
        self.patience = Patience()
        self.counts = WatchCounts()
        self._looks: dict[Callable[[], Look], None] = {}
        self._scheduled = False
        self._moved_at = 0.0
        self._turned_at = 0.0
        self._rested_at = 0.0
        self._courteous_until = 0.0
        self._promptest_s = float("inf")  # by how much the most punctual sleep was late

    def add(self, look: Callable[[], Look]) -> None:
        """Look until it is over, from the loop's next turn on. One that is watched already has moved: look eagerly."""
        self._looks[look] = None
        self._moved_at = time.perf_counter()
        if not self._scheduled:
            if self._moved_at - self._turned_at > self.patience.bite_s:
                self._rested_at = self._moved_at  # as nothing was watched for so long, the loop slept
            self._schedule()

    def watches(self, look: Callable[[], Look]) -> bool:
        """Whether it is not over yet. Not to be asked by a look."""
        return look in self._looks

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        began = time.perf_counter()
        looks, self._looks = self._looks, {}
        moved = False
        for look in looks:
            found = self._found(look)
            moved |= found is Look.MOVED
            if found is not Look.OVER:
                self._looks[look] = None
        self._turned_at = now = time.perf_counter()
        self.counts.num_turns += 1
        self.counts.looking_s += now - began
        self._scheduled = False
        if self._looks:
            if moved:
                self._moved_at = now
            self._rest(now, moved)
            self._schedule()

    def _found(self, look: Callable[[], Look]) -> Look:
        try:
            return look()
        except Exception as error:  # the others go on
            asyncio.get_running_loop().call_exception_handler({"message": "a look failed", "exception": error})
            return Look.OVER

    def _rest(self, now: float, moved: bool) -> None:
        still_s, awake_s = max(0.0, now - self._moved_at), now - self._rested_at
        asked_s = self.patience.rest_s(still_s, awake_s, moved, now < self._courteous_until)
        if asked_s == 0.0:
            return
        pause(asked_s)
        self._rested_at = time.perf_counter()
        slept_s = self._rested_at - now
        late_s = slept_s - asked_s
        self._promptest_s = min(self._promptest_s, late_s)
        if late_s - self._promptest_s > self.patience.late_s:
            self._courteous_until = self._rested_at + self.patience.courtesy_s
        self.counts.num_rests += 1
        self.counts.resting_s += slept_s


_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWatch] = WeakKeyDictionary()


def loop_watch() -> LoopWatch:
    """The watch of the running loop."""
    loop = asyncio.get_running_loop()
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = LoopWatch()
    return watch


def allow_short_sleeps() -> None:
    """Let this thread's sleeps end on time: by default Linux adds up to 50 µs to each. Elsewhere this does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)


def pause(seconds: float) -> None:
    """Sleep without the interpreter's lock."""
    time.sleep(seconds)
