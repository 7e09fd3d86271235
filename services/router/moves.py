"""Whether an output whose attempt failed is sent again, and after which pause. Pure: no clock, no tasks.

Only deaths are counted against `max_worker_losses`, and what a worker itself did wrong: that bound is for requests that
kill workers. A worker that was connected to again as the one it was has not died. Draining, preemption and want of room
blame nobody; workers that cannot be reached are tried again with growing pauses, for as long as the output is patient.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import (
    BatonError,
    Cancelled,
    ConnectionLost,
    Preempted,
    RanksLost,
    ResourceExhausted,
    TransferError,
    Unavailable,
    WorkerDraining,
)

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0


class Reason(enum.Enum):
    """Why an attempt failed."""

    PREEMPTED = "its blocks went to others"
    DRAINED = "a worker drains or stops"
    FULL = "a worker had no place for it"
    DIED = "ranks died, or a connection broke and perhaps the process with it"
    UNREACHABLE = "a worker did not answer, or the hand-off failed"
    FAILED = "a worker did something wrong, or the two do not fit"


@dataclass(frozen=True, slots=True)
class WorkerLife:
    """One life of a worker's ranks. They share their fate with everything that runs on them."""

    worker: str  # role and address
    incarnation: str
    num_ranks_lost: int


@dataclass(frozen=True, slots=True)
class MoveLimits:
    """How much an output puts up with."""

    max_worker_losses: int
    placement_timeout_s: float  # of an output without tokens
    migration_timeout_s: float  # of one that has some


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that failed."""

    cause: BatonError
    reason: Reason
    lives: tuple[WorkerLife, ...]  # of whom it may have killed
    has_output: bool
    num_new_tokens: int


def reason_of(cause: BatonError, is_draining: bool) -> Reason:
    """`is_draining`: whether one of those who are blamed said that it drains."""
    if isinstance(cause, Preempted):
        return Reason.PREEMPTED
    if isinstance(cause, WorkerDraining | Cancelled):  # we did not cancel it: the worker stops
        return Reason.DRAINED
    if is_draining and isinstance(cause, Unavailable | TransferError):
        return Reason.DRAINED
    if isinstance(cause, ResourceExhausted):
        return Reason.FULL
    if isinstance(cause, RanksLost | ConnectionLost):
        return Reason.DIED
    if isinstance(cause, Unavailable | TransferError):
        return Reason.UNREACHABLE
    return Reason.FAILED


class Moves:
    """What one output has been through. `life_of` says the life of a worker as far as it is known now."""

    def __init__(self, limits: MoveLimits, life_of: Callable[[str], WorkerLife | None], rng: random.Random) -> None:
        self._limits = limits
        self._life_of = life_of
        self._rng = rng
        self._suspected: dict[WorkerLife, Reason] = {}  # that may have ended while the output was there
        self._num_certain = 0  # deaths, and failures of workers that live on
        self._num_refusals = 0  # for want of room, of an output that holds none yet
        self._num_stalls = 0  # attempts in a row that brought nothing
        self._num_unreached = 0  # of them, attempts that reached nobody
        self._paused_s = 0.0  # in all since it last went on

    @property
    def num_deaths(self) -> int:
        """How many times a worker died with the output on it, as far as is known now."""
        return self._num_certain + sum(self._has_ended(*suspect) for suspect in self._suspected.items())

    def pause_s(self, failure: Failure) -> float | None:
        """How long to wait before the next attempt; None: there is to be none."""
        self._note_progress(failure)
        self._count(failure)
        if self._has_had_enough(failure):
            return None
        if self._num_stalls <= 1:
            return 0.0
        longest_s = min(FIRST_BACKOFF_S * 2.0 ** min(self._num_stalls, 10), LAST_BACKOFF_S)
        pause_s = longest_s * (0.5 + 0.5 * self._rng.random())
        self._paused_s += pause_s
        return pause_s

    def _note_progress(self, failure: Failure) -> None:
        # Prefill alone brings a token with each attempt: an output whose hand-offs fail does not go on.
        num_needed = 1 if failure.reason in (Reason.PREEMPTED, Reason.DRAINED) else 2
        if failure.num_new_tokens >= num_needed and failure.reason is not Reason.FULL:
            self._num_stalls = self._num_unreached = 0
            self._paused_s = 0.0
        else:
            self._num_stalls += 1

    def _count(self, failure: Failure) -> None:
        if failure.reason is Reason.FAILED or isinstance(failure.cause, RanksLost):
            self._num_certain += 1
        elif failure.reason in (Reason.DIED, Reason.UNREACHABLE):
            self._suspected.update(dict.fromkeys(failure.lives, failure.reason))
        if failure.reason is Reason.UNREACHABLE:
            self._num_unreached += 1
        elif failure.reason is Reason.FULL and not failure.has_output:
            self._num_refusals += 1

    def _has_had_enough(self, failure: Failure) -> bool:
        limits = self._limits
        if max(self.num_deaths, self._num_refusals) > limits.max_worker_losses:
            return True
        patience_s = limits.migration_timeout_s if failure.has_output else limits.placement_timeout_s
        if self._paused_s < patience_s:
            return False
        # One that has output has lost nothing for want of room: a place comes free when another output ends.
        if failure.reason is Reason.FULL:
            return failure.has_output
        return failure.reason is Reason.UNREACHABLE and self._num_unreached > limits.max_worker_losses

    def _has_ended(self, life: WorkerLife, reason: Reason) -> bool:
        now = self._life_of(life.worker)
        if now is None:
            return reason is Reason.DIED  # it has not been seen since its connection broke
        return now != life


class Patience:
    """How long somebody waits for a worker: so long as one is on its way, and for `patience_s` without any."""

    def __init__(self, patience_s: float, now_s: float) -> None:
        self._patience_s = patience_s
        self._give_up_s = now_s + patience_s

    def until_s(self, now_s: float, starts_until_s: float) -> float | None:
        """When to look again if nothing changes meanwhile; None: to give up now. `starts_until_s`: until when some
        worker counts as on its way."""
        if starts_until_s > now_s:
            self._give_up_s = max(self._give_up_s, now_s + self._patience_s)
            return max(starts_until_s, self._give_up_s)
        return self._give_up_s if now_s < self._give_up_s else None
