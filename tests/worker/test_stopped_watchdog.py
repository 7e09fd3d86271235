"""Ranks that were stopped are given up within seconds; what only looks so for a moment is not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from common.stopped_process import stopped_at
from common.worker.stopped_watchdog import watch_for_stopped
from tests.decode.fake_group import FakeGroup


def looks(*seen: str) -> tuple[Callable[[int], int | None], Callable[[float], Awaitable[None]], list[float]]:
    """What is seen of the ranks, a string for each second, `T` for one that is stopped; then the group is lost."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > len(seen):
            raise asyncio.CancelledError

    return lambda pid: 7 if seen[len(slept) - 1][pid - 1000] == "T" else None, sleep, slept


async def test_a_rank_that_stopped_at_for_four_looks_ends_the_group() -> None:
    group = FakeGroup(tp_size=2)
    look, sleep, slept = looks("RS", "RT", "ST", "RT", "RT")
    await watch_for_stopped(group, look, sleep)
    assert group.lost_reason == "rank 1 (process 1001) is stopped"
    assert sum(slept[1:]) <= 4.0


async def test_a_rank_that_goes_on_is_left_alone() -> None:
    group = FakeGroup(tp_size=2)
    look, sleep, _ = looks("RT", "RT", "RT", "RS", "TT", "TT", "TT", "RR", "RT")
    with pytest.raises(asyncio.CancelledError):
        await watch_for_stopped(group, look, sleep)
    assert group.lost_reason is None


def test_the_kernel_tells_a_stopped_process_from_others() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert stopped_at(process.pid) is None
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert stopped_at(process.pid) is not None
        os.kill(process.pid, signal.SIGCONT)
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)
        assert stopped_at(process.pid) is None
    finally:
        process.kill()
        process.communicate()
    assert stopped_at(process.pid) is None
