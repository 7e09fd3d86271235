"""Processes that work together and end together: when one fails or time is up, all are killed and the caller is told.

Ranks that wait for each other on a device cannot be interrupted; killing their processes is the only way out. Linux.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from common.parent_death import environment_of_child

TIMED_OUT: Final = 124  # exit status, as of `timeout`
_POLL_S: Final = 0.05
_KILL_S: Final = 10.0  # a process whose device hangs may take a while, or for ever


def run_ranks(commands: Sequence[Sequence[str]], limit_s: float) -> int:
    """Run a process per command until all have ended well, or the first has not. Returns its exit status, else 0.

    Negative as `subprocess` has it for a signal; `TIMED_OUT` after `limit_s`. None of them runs afterwards, nor if this
    process is killed, provided that they call `end_with_parent`. They share standard output and error.
    """
    deadline_s = time.monotonic() + limit_s
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            ranks.append(subprocess.Popen(command, env=environment_of_child()))
        return _first_failure(ranks, deadline_s)
    finally:
        _kill(ranks)


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], deadline_s: float) -> int:
    while True:
        statuses = [rank.poll() for rank in ranks]
        for number, status in enumerate(statuses):
            if status:
                _say(f"rank {number} ended with status {status}: the others are killed")
                return status
        running = [rank for rank, status in zip(ranks, statuses, strict=True) if status is None]
        if not running:
            return 0
        if time.monotonic() > deadline_s:
            _say(f"{len(running)} of {len(ranks)} ranks were not done in time and are killed")
            return TIMED_OUT
        _wait(running[0], _POLL_S)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    deadline_s = time.monotonic() + _KILL_S
    for number, rank in enumerate(ranks):
        if not _wait(rank, max(_POLL_S, deadline_s - time.monotonic())):
            _say(f"rank {number} (process {rank.pid}) was killed, but does not end")


def _wait(rank: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended."""
    try:
        rank.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
