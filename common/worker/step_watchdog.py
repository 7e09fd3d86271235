"""Notices ranks that hang: alive, but without an answer to a step. Knows nothing of what a step computes."""

from __future__ import annotations

import asyncio
from typing import Final

from common.worker.rank_group import RankGroup

_MAX_GRACE_S: Final = 5.0


def grace_s(timeout_s: float) -> float:
    """How long to wait for an answer whose time is up, before a rank is given up: a front that stood still itself, as
    on a machine that was paused, finds the timer due before it has read what came meanwhile."""
    return min(timeout_s / 4, _MAX_GRACE_S)


class StepWatchdog:
    """Declares a group lost when the result of its oldest plan does not come within `timeout_s`, and `grace_s` more.

    The time of a plan counts from its submission or from the result before it, whichever was later: ranks compute
    one plan after the other. Whoever waits for the group is told as if a rank had died, and its supervisor kills it.
    """

    def __init__(self, group: RankGroup, timeout_s: float) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._num_unanswered = 0
        self._timer: asyncio.TimerHandle | None = None

    def submitted(self) -> None:
        """The group got one more plan."""
        self._num_unanswered += 1
        if self._timer is None:
            self._start()

    def answered(self) -> None:
        """The result of the oldest plan is here."""
        self._num_unanswered -= 1
        self.stop()
        if self._num_unanswered:
            self._start()

    def stop(self) -> None:
        """Watch no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._look_again)

    def _look_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(grace_s(self._timeout_s), self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        self._group.lose(f"the ranks hang: no result of a step within {self._timeout_s:g} s")
