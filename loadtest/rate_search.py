"""The highest request rate at which enough requests meet their limits: grow until it fails, then bisect.

Each rate is measured once, so noise can move the answer: an unlucky run makes it too low, a lucky one too high, and
`Probe.is_close_call` marks those that another run could well turn over. The answer is a rate whose own run met, below
every rate that missed. A miss that late or unsent requests of the generator could account for is none: it ends the
search. Knows nothing of how a run is made.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from common.errors import BatonError, InvalidArgument
from loadtest.goodput import Goodput, Limits, goodput
from loadtest.measured import measured_part
from loadtest.record import Run
from loadtest.statistics import is_generator_behind, is_punctual, summarize

_GROWTH = 2.0
_MIN_RESOLUTION = 1e-3


class Ending(StrEnum):
    """Why a search stopped."""

    RESOLVED = "the answer is known to the resolution"
    HIGH_RATE_MET = "the highest rate allowed still meets the limits"
    LOW_RATE_MISSED = "even the lowest rate misses the limits"
    MAX_RUNS = "the number of runs is used up"
    INTERRUPTED = "a run was interrupted"
    FAILED = "a run failed"
    GENERATOR_LIMIT = "the load generator could not keep up, so the server's limit was not reached"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where to search and when to stop. `resolution` is relative: 0.05 stops when the bracket is 5 % wide."""

    low_rate: float
    high_rate: float
    resolution: float
    max_runs: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low_rate) and self.low_rate > 0):
            raise InvalidArgument("low_rate", self.low_rate, "a number of requests/s above 0")
        if not (math.isfinite(self.high_rate) and self.high_rate >= self.low_rate):
            raise InvalidArgument("high_rate", self.high_rate, f"at least low_rate, {self.low_rate} requests/s")
        if not (math.isfinite(self.resolution) and self.resolution >= _MIN_RESOLUTION):
            raise InvalidArgument("resolution", self.resolution, f"at least {_MIN_RESOLUTION}")
        if self.max_runs < 1:
            raise InvalidArgument("max_runs", self.max_runs, "at least 1")


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that was tried."""

    rate: float  # requests/s that were asked for
    run: Run
    goodput: Goodput
    is_met: bool
    is_close_call: bool  # within two standard errors of the share asked for


@dataclass(frozen=True, slots=True)
class RateSearch:
    """A finished search: the curve of goodput against rate, in the order it was measured, and the answer."""

    itl_s: float
    share: float
    probes: tuple[Probe, ...]
    answer: float | None  # requests/s; None: no run met
    ending: Ending
    failure: str = ""  # what failed, if that ended it


def next_rate(met: Sequence[float], missed: Sequence[float], bounds: Bounds) -> float | Ending:
    """The rate to try after these, or why to stop. Does not count runs."""
    if missed and not met:
        return Ending.LOW_RATE_MISSED
    if not met:
        return bounds.low_rate
    best = max(met)
    if not missed:
        return Ending.HIGH_RATE_MET if best >= bounds.high_rate else min(best * _GROWTH, bounds.high_rate)
    worst = min(missed)
    if worst <= best * (1 + bounds.resolution):
        return Ending.RESOLVED
    return math.sqrt(best * worst)  # the resolution is relative, so the middle is too


async def find_rate(
    measure: Callable[[float], Awaitable[Run]],
    limits: Limits,
    itl_s: float,
    share: float,
    low_rate: float,
    high_rate: float,
    resolution: float = 0.05,
    max_runs: int = 12,
) -> RateSearch:
    """Highest rate, in requests/s, at which `share` of the requests meet `limits.ttft_s` with every gap within `itl_s`.

    Awaits one run at a time. A run that was interrupted or failed ends the search and decides nothing. So does an error
    of `measure`; it is raised if no run came before. Cancelling loses what was found.
    """
    bounds = Bounds(low_rate, high_rate, resolution, max_runs)
    _check(itl_s, share)
    probes: list[Probe] = []
    while not isinstance(step := _step(probes, bounds), Ending):
        try:
            run = await measure(step)
        except BatonError as error:
            if not probes:
                raise
            failure = f"{type(error).__name__}: {error}"
            return RateSearch(itl_s, share, tuple(probes), _best(probes), Ending.FAILED, failure)
        probe = _judge(step, run, limits.ttft_s, itl_s, share)
        ending = _early_ending(probe, limits.ttft_s, itl_s, share)
        if ending is not None:
            return RateSearch(itl_s, share, (*probes, probe), _best(probes), ending, run.info.failure)
        probes.append(probe)
    return RateSearch(itl_s, share, tuple(probes), _best(probes), step)


def _step(probes: Sequence[Probe], bounds: Bounds) -> float | Ending:
    met = [probe.rate for probe in probes if probe.is_met]
    step = next_rate(met, [probe.rate for probe in probes if not probe.is_met], bounds)
    is_used_up = len(probes) == bounds.max_runs
    return Ending.MAX_RUNS if is_used_up and not isinstance(step, Ending) else step


def _best(probes: Sequence[Probe]) -> float | None:
    return max((probe.rate for probe in probes if probe.is_met), default=None)


def _early_ending(probe: Probe, ttft_s: float | None, itl_s: float, share: float) -> Ending | None:
    """Why a run decides nothing; None if it does."""
    if probe.run.info.failure:
        return Ending.FAILED
    if probe.run.info.was_interrupted:
        return Ending.INTERRUPTED
    if not probe.is_met and _could_be_the_generator(probe, ttft_s, itl_s, share):
        return Ending.GENERATOR_LIMIT
    return None


def _could_be_the_generator(probe: Probe, ttft_s: float | None, itl_s: float, share: float) -> bool:
    """Whether the rate would have been met if all requests that were late or not sent at all had met the limits."""
    if not is_generator_behind(summarize(measured_part(probe.run))):
        return False
    punctual = tuple(record for record in probe.run.records if is_punctual(record))
    result = goodput(measured_part(msgspec.structs.replace(probe.run, records=punctual)), ttft_s, itl_s)
    num_missed = result.num_counted - result.num_met
    return 1 - num_missed / probe.goodput.num_counted >= share


def _judge(rate: float, run: Run, ttft_s: float | None, itl_s: float, share: float) -> Probe:
    result = goodput(measured_part(run), ttft_s, itl_s)
    if result.share is None:
        return Probe(rate, run, result, is_met=False, is_close_call=False)
    two_errors = 2 * math.sqrt(share * (1 - share) / result.num_counted)
    is_met = result.share >= share
    return Probe(rate, run, result, is_met=is_met, is_close_call=abs(result.share - share) <= two_errors)


def _check(itl_s: float, share: float) -> None:
    Limits(ttft_s=None, itl_s=(itl_s,))
    if not 0 < share <= 1:
        raise InvalidArgument("share", share, "above 0, at most 1")
