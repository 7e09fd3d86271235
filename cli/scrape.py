"""One look at a service's Prometheus metrics, and what two looks say about the time between them."""

from __future__ import annotations

import asyncio
import http.client
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from common.errors import Unavailable

_MAX_BYTES = 8 << 20
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """Every sample, by name and labels."""

    samples: Mapping[tuple[str, Labels], float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Scrape:
        families = text_string_to_metric_families(text)
        return cls(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
            }
        )

    @classmethod
    def merged(cls, scrapes: Sequence[Scrape]) -> Scrape:
        """The sum of several processes of one service."""
        totals: dict[tuple[str, Labels], float] = {}
        for one in scrapes:
            for key, value in one.samples.items():
                totals[key] = totals.get(key, 0.0) + value
        return cls(totals)

    def total(self, name: str) -> float:
        """All samples of a name, whatever their labels; 0 if there is none."""
        return sum(value for (found, _), value in self.samples.items() if found == name)

    def value(self, name: str, **labels: str) -> float:
        """One sample. Raises `KeyError` if there is none of this name with exactly these labels."""
        return self.samples[name, frozenset(labels.items())]

    def buckets(self, histogram: str) -> dict[float, float]:
        """By upper bound, how many observations did not exceed it; empty if there is no such histogram."""
        found = {}
        for (name, labels), value in self.samples.items():
            if name == f"{histogram}_bucket":
                found[float(dict(labels)["le"])] = value
        return dict(sorted(found.items()))


async def scrape(url: str, timeout_s: float) -> Scrape:
    """Fetch and parse. Raises `Unavailable` if the URL does not answer with metrics in time."""
    text = await asyncio.to_thread(_fetch, url, timeout_s)
    try:
        return Scrape.parse(text)
    except ValueError as error:
        raise Unavailable(f"{url} answers, but not with metrics: {error}") from error


def quantile(before: Scrape, after: Scrape, histogram: str, q: float) -> float | None:
    """A quantile of what was observed between two scrapes, interpolated within its bucket as Prometheus does.

    None if nothing was. In the bucket without an upper bound it is the highest bound there is.
    """
    earlier, later = before.buckets(histogram), after.buckets(histogram)
    counts = {bound: count - earlier.get(bound, 0.0) for bound, count in later.items()}
    total = counts.get(math.inf, 0.0)
    if total <= 0:
        return None
    low_bound, low_count = 0.0, 0.0
    for bound, count in counts.items():
        if count >= q * total:
            if math.isinf(bound):
                return low_bound
            share = (q * total - low_count) / (count - low_count) if count > low_count else 0.0
            return low_bound + (bound - low_bound) * share
        low_bound, low_count = bound, count
    return low_bound


def _fetch(url: str, timeout_s: float) -> str:
    if not url.startswith(("http://", "https://")):
        raise Unavailable(f"{url} is no http URL")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            content: bytes = response.read(_MAX_BYTES)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise Unavailable(f"no metrics from {url}: {error or type(error).__name__}") from error
    return content.decode(errors="replace")
