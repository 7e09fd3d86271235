"""How long a request would wait before it is served, and whether it has the time. Pure.

Under overload requests wait where work is scarce: for prompt tokens to be computed before them, or for the rows of
sequences before them. Workers say how much waits there and how long each unit of it takes. Where many rows make a step
long, those who share it wait for each other: what a request takes now beyond what it takes alone is waiting, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.router.placement import Candidate, LocalPrefill

USABLE_SHARE = 0.8  # of the time left: queues are estimated of means
LONG_DEVIATIONS = 2.0  # few outputs are longer than the mean by more
PACE_MARGIN = 1.25  # of what a long output takes at the pace of now: those that come later share it
FREE_SHARE = 0.1  # of the time left, which any request may be held up: what it takes itself is known least
LEAST_WEIGHT = 0.05  # of the newest output in the means
DRIFT = 0.002  # for each output, of the shortest step towards that of now: machines do not stay as they are


@dataclass(frozen=True, slots=True)
class Service:
    """What an output takes once it is its turn."""

    alone_s: float
    now_s: float  # beside those that run now
    longest_s: float  # what few exceed


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request has before it, from its place in the router on."""

    worker_wait_s: float
    service: Service
    left_s: float

    def excess_s(self, own_wait_s: float) -> float:
        """By how much it would be late if it also waits so long for its place; not above 0: it has the time."""
        wait_s = own_wait_s + self.worker_wait_s
        late_s = wait_s + self.service.longest_s - USABLE_SHARE * self.left_s
        held_up_s = wait_s + max(0.0, self.service.now_s - self.service.alone_s)
        # One that is held up by nobody and has too little time is its client's business.
        return min(late_s, held_up_s - FREE_SHARE * self.left_s)


def worker_wait_s(prefills: Sequence[Candidate], decodes: Sequence[Candidate], local: LocalPrefill) -> float:
    """How long the workers' queues hold up a request that comes now. A sequence is in both at once: those that wait
    for prefill are before it at decode as well, so that the longer of the two waits has the other in it."""
    if local is LocalPrefill.ALWAYS:
        prefills = ()
    return max(_usual([c.wait_s for c in prefills]), _usual([c.wait_s for c in decodes]))


def step_s(decodes: Sequence[Candidate]) -> float:
    """The time of a step where most sequences go."""
    return _usual([candidate.step_s for candidate in decodes])


def _usual(values_s: Sequence[float]) -> float:
    """Where most requests go: of two workers the less loaded is taken."""
    return sorted(values_s)[(len(values_s) - 1) // 2] if values_s else 0.0


class ServiceTimes:
    """How long outputs took when nothing held them up, averaged over the last few dozen."""

    def __init__(self) -> None:
        self._num_outputs = 0
        self._first_token_s = 0.0
        self._token_s = 0.0
        self._num_tokens = 0.0
        self._variance = 0.0  # of the number of tokens
        self._shortest_step_s = 0.0

    def served(self, first_token_s: float, decode_s: float, num_tokens: int) -> None:
        """An output is complete: the time until its first token and after it, without any queue."""
        self._num_outputs += 1
        weight = max(LEAST_WEIGHT, 1.0 / self._num_outputs)
        token_s = decode_s / max(1, num_tokens)
        self._first_token_s += (first_token_s - self._first_token_s) * weight
        self._token_s += (token_s - self._token_s) * weight
        self._note_length(num_tokens, weight)
        if self._shortest_step_s:
            self._shortest_step_s += max(0.0, token_s - self._shortest_step_s) * DRIFT

    def cut_off(self, num_tokens: int) -> None:
        """An output ended before its time: the long ones would be missing among those that are served."""
        if num_tokens > self._num_tokens:
            self._note_length(num_tokens, LEAST_WEIGHT)

    def expected(self, max_tokens: int | None, step_s: float) -> Service:
        """Of an output that has the usual length, or `max_tokens` if that is less. `step_s`: of now; 0 if nothing runs
        there, or if the workers never say."""
        if step_s:
            self._shortest_step_s = min(self._shortest_step_s or step_s, step_s)
        # Where nothing runs an output is alone: what those took that were served in a crowd says nothing of it.
        shortest_s = self._shortest_step_s or self._token_s
        pace_s = step_s or shortest_s
        num_tokens = self._num_tokens if max_tokens is None else min(max_tokens, self._num_tokens)
        now_s = self._first_token_s + num_tokens * pace_s
        alone_s = self._first_token_s + num_tokens * shortest_s
        long_tokens = self._num_tokens + LONG_DEVIATIONS * math.sqrt(self._variance)
        long_tokens = long_tokens if max_tokens is None else min(max_tokens, long_tokens)
        longest_s = self._first_token_s + long_tokens * pace_s
        return Service(min(alone_s, now_s), now_s, PACE_MARGIN * longest_s)

    def _note_length(self, num_tokens: int, weight: float) -> None:
        deviation = num_tokens - self._num_tokens
        self._num_tokens += deviation * weight
        self._variance = (1.0 - weight) * (self._variance + weight * deviation * deviation)
