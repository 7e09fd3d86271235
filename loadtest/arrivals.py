"""When requests are due: one arrival process, from evenly spaced to bursty. Pure and seeded.

The gaps are gamma distributed; their coefficient of variation (CV) says how bursty: 0 is a constant rate, 1 is Poisson
(gaps are exponential), above 1 comes in bursts. Knows nothing of what is sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import InvalidArgument

_SEED_STREAM = 1  # apart from the streams that draw lengths and prompts
_DRAWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests that arrive at `rate_per_s` on average, whatever becomes of them."""

    rate_per_s: float
    cv: float = 1.0  # of the gaps

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate_per_s) and self.rate_per_s > 0):
            raise InvalidArgument("rate", self.rate_per_s, "requests per second, above 0")
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise InvalidArgument("cv", self.cv, "coefficient of variation of the gaps, 0 or more")

    def due_times_s(self, seed: int) -> Iterator[float]:
        """Due times in seconds without end. The first is 0."""
        if self.cv == 0:
            yield from (index / self.rate_per_s for index in itertools.count())
        due_s = 0.0
        for gap_s in self._gaps_s(seed):
            yield due_s
            due_s += gap_s

    def describe(self) -> str:
        """In words, for the report."""
        name = {0.0: "constant rate", 1.0: "Poisson"}.get(self.cv, f"gamma with CV {self.cv:g}")
        return f"{name}, {self.rate_per_s:g} requests/s"

    def describe_scale(self) -> str:
        """The rate is what the user asked for: nothing is scaled."""
        return ""

    def _gaps_s(self, seed: int) -> Iterator[float]:
        generator = np.random.default_rng([seed, _SEED_STREAM])
        shape = self.cv**-2
        mean_s = 1 / self.rate_per_s
        while True:
            yield from (generator.standard_gamma(shape, _DRAWS_AT_ONCE) * (mean_s / shape)).tolist()
