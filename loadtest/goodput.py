"""Goodput: how much of the load was served as well as was promised. Pure.

Judging each request by a limit on its time to first token *and* one on its time per output token is DistServe's
definition (Zhong et al., OSDI'24). There the second is on a request's mean, which an answer that stalls for a second
can still meet; the headline here is stricter: *every* gap between messages must be within it. The mean, and a request's
own p99 gap, are given beside it. Tokens that came in one message are one arrival: merging adds no gaps of zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from common.errors import InvalidArgument
from loadtest.measured import Floats, Measured


class Variant(StrEnum):
    """What of a request's output is compared with the limit on gaps."""

    EVERY_GAP = "every-gap"  # the largest gap; the headline
    P99_GAP = "p99-gap"  # the request's own p99 gap
    MEAN_TPOT = "mean-TPOT"  # its mean time per output token, as DistServe does


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must meet. Each limit on gaps is judged by itself; None or none: no limit of that kind."""

    ttft_s: float | None
    itl_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.ttft_s is not None:
            _check_limit("ttft_s", self.ttft_s)
        for itl_s in self.itl_s:
            _check_limit("itl_s", itl_s)


@dataclass(frozen=True, slots=True)
class Goodput:
    """The requests that met a TTFT limit and one limit on gaps, of all that were measured and not interrupted."""

    variant: Variant
    ttft_s: float | None
    itl_s: float | None
    num_met: int
    num_counted: int  # a failed request counts, as missed
    num_interrupted: int  # neither met nor missed
    share: float | None  # None if nothing was counted
    requests_per_s: float | None  # requests that met, over the measured window


def goodput(
    measured: Measured, ttft_s: float | None, itl_s: float | None, variant: Variant = Variant.EVERY_GAP
) -> Goodput:
    """Judge every request. A value equal to its limit meets it."""
    needed_s = limit_needed_s(measured, ttft_s, variant)
    num_met = int(np.count_nonzero(needed_s <= (math.inf if itl_s is None else itl_s)))
    return Goodput(
        variant=variant,
        ttft_s=ttft_s,
        itl_s=itl_s,
        num_met=num_met,
        num_counted=measured.num_counted,
        num_interrupted=len(measured.interrupted),
        share=num_met / measured.num_counted if measured.num_counted else None,
        requests_per_s=num_met / measured.window_s if measured.window_s else None,
    )


def goodputs(measured: Measured, limits: Limits) -> tuple[Goodput, ...]:
    """For every limit on gaps, in the order given, every variant, the headline first. Without a limit: one row."""
    if not limits.itl_s:
        return (goodput(measured, limits.ttft_s, None),)
    return tuple(goodput(measured, limits.ttft_s, itl_s, variant) for itl_s in limits.itl_s for variant in Variant)


def limit_needed_s(measured: Measured, ttft_s: float | None, variant: Variant) -> Floats:
    """For each finished request within the TTFT limit, the smallest limit on gaps that it meets; in no useful order.

    A request without a gap, one token or one message, meets any. Where an answer had no token its end stands for the
    first one.
    """
    match variant:
        case Variant.EVERY_GAP:
            pace_s = measured.largest_gap_s
        case Variant.P99_GAP:
            pace_s = measured.p99_gap_s
        case Variant.MEAN_TPOT:
            pace_s = np.nan_to_num(measured.tpot_s, nan=0.0)
    return pace_s if ttft_s is None else pace_s[measured.wait_s <= ttft_s]


def _check_limit(field: str, value_s: float) -> None:
    if not (math.isfinite(value_s) and value_s > 0):
        raise InvalidArgument(field, value_s, "a limit is a number of seconds above 0")
