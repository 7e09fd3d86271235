"""How far outputs agree with those of the same seeded requests computed otherwise. Pure: tokens in, counts out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Outputs = Sequence[Sequence[int]]  # of each request, its tokens
_EXPECTED_AT_95: float = 3.0  # events that were possible although none was seen


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two lists of outputs, request by request."""

    num_requests: int
    num_tokens: int  # of each output
    first_differences: tuple[int, ...]  # positions, ascending; of the requests that differ at all

    @property
    def differing(self) -> float:
        """Share of the requests."""
        return len(self.first_differences) / self.num_requests

    @property
    def tokens_before(self) -> float:
        """Share of all tokens that come before the first difference of their request."""
        num_same = self.num_requests - len(self.first_differences)
        return (num_same * self.num_tokens + sum(self.first_differences)) / (self.num_requests * self.num_tokens)

    @property
    def num_compared(self) -> int:
        """Tokens that were drawn after equal tokens; what comes after a difference compares nothing."""
        num_before = round(self.tokens_before * self.num_requests * self.num_tokens)
        return num_before + len(self.first_differences)

    @property
    def rate(self) -> str:
        """How often a token differs after equal ones; if none did, the rate that is excluded with 95 % confidence."""
        if not self.first_differences:
            return f"< {_EXPECTED_AT_95 / self.num_compared:.1e}"
        return f"{len(self.first_differences) / self.num_compared:.1e}"

    def histogram(self, num_bins: int = 4) -> list[int]:
        """First differences by position, in bins of equal width."""
        bins = [0] * num_bins
        for position in self.first_differences:
            bins[position * num_bins // self.num_tokens] += 1
        return bins

    def markdown(self, name: str) -> str:
        """A line of a table under `HEADER`."""
        firsts = self.first_differences
        spread = f"{firsts[0]} / {statistics.median_low(firsts)} / {firsts[-1]}" if firsts else "–"
        cells = [name, str(self.num_requests), f"{len(firsts)} ({self.differing:.1%})", f"{self.tokens_before:.1%}"]
        return f"| {' | '.join((*cells, self.rate, spread, ' / '.join(map(str, self.histogram()))))} |"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return {
            "requests": self.num_requests,
            "tokens": self.num_tokens,
            "differing": self.differing,
            "tokens_before": self.tokens_before,
            "compared": self.num_compared,
            "first_differences": list(self.first_differences),
        }


HEADER = (
    "| outputs | requests | differ | tokens before | a token differs | first at: min / median / max | by quarter |\n"
    "|---|---|---|---|---|---|---|"
)


def compare(outputs: Outputs, others: Outputs) -> Agreement:
    """Raises `ValueError` unless both have the same requests and all outputs are equally long."""
    lengths = {len(output) for output in (*outputs, *others)}
    if len(outputs) != len(others) or len(lengths) != 1 or not min(lengths):
        raise ValueError(f"{len(outputs)} and {len(others)} outputs of {sorted(lengths)} tokens cannot be compared")
    firsts = []
    for own, other in zip(outputs, others, strict=True):
        differing = (place for place, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
        if (first := next(differing, None)) is not None:
            firsts.append(first)
    return Agreement(len(outputs), lengths.pop(), tuple(sorted(firsts)))
