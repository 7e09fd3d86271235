"""Processes that end with the process that started them, also when that is killed. Linux only; elsewhere no effect."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

PARENT_PID: Final = "BATON_PARENT_PID"  # environment variable, set by whoever starts such a process
# For a process that finishes what is under way first (common.stop_signals); one that takes no signals yet ends at once.
# A signal of its own, as it comes several times: when a parent is killed, its threads end one by one, a child passes
# from each to the next, and the kernel signals it each time. Somebody who sends SIGTERM twice wants haste.
PARENT_GONE: Final = signal.SIGUSR1
_PR_SET_PDEATHSIG: Final = 1


def environment_of_child() -> dict[str, str]:
    """The environment for a process that is to end with this one."""
    return os.environ | {PARENT_PID: str(os.getpid())}


def end_with_parent(environ: Mapping[str, str], number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this signal here when the parent is gone. No effect without `PARENT_PID`."""
    parent_pid = environ.get(PARENT_PID)
    if parent_pid is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if str(os.getppid()) != parent_pid:
        os._exit(1)  # it died before we asked
