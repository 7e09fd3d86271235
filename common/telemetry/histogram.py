"""A histogram that costs a binary search and two additions per observation, and no lock.

One thread observes; any thread may read. A reader may see an observation in a bucket and not yet in the sum, never a
count that differs from its buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

# From a 7-million-parameter model on a CPU to 8 billion parameters on a GPU, and both when they are overloaded.
STEP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
INTER_TOKEN_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 5)
FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
WAIT_BUCKETS_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Histogram:
    """Observations by upper bound; the last bucket has none. `name` comes without the service's prefix."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(set(bounds)), f"the bounds of {name} do not rise"
        self.name = name
        self.help = text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, n: int = 1) -> None:
        """Count `n` observations of one value."""
        self._counts[bisect_left(self._bounds, value)] += n
        self._sum += value * n

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """Of all observed values."""
        return self._sum

    def cumulative(self) -> list[tuple[str, float]]:
        """For each upper bound, `+Inf` last, how many observations do not exceed it."""
        bounds = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(map(float, self._counts)), strict=True))
