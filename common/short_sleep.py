"""Sleeps of some microseconds, for threads that watch a GPU: the interpreter is free for others meanwhile.

Spinning instead would be no faster and would take the interpreter from the thread that computes, again and again.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Final

_PR_SET_TIMERSLACK: Final = 29
_SLACK_NS: Final = 1_000


def allow_short_sleeps() -> None:
    """Let this thread's sleeps end on time: by default Linux adds up to 50 µs to each. Elsewhere this does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)


def pause(seconds: float) -> None:
    """Sleep without the interpreter's lock."""
    time.sleep(seconds)
