"""Limits that the figures of a benchmark must keep, and which of them a run missed. Knows no benchmark."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure and its bound: `Limit("messages_per_s", ">=", 10_000)`."""

    figure: str
    sense: Literal[">=", "<=", "<"]
    bound: float

    def is_kept(self, value: float) -> bool:
        """Whether the figure may have this value. What is no number keeps no limit."""
        match self.sense:
            case ">=":
                return value >= self.bound
            case "<=":
                return value <= self.bound
            case "<":
                return value < self.bound


def missed(figures: Mapping[str, float], limits: Sequence[Limit]) -> list[str]:
    """A line for each limit that the figures miss, naming figure and limit; one that was not measured is missed."""
    lines = []
    for limit in limits:
        value = figures.get(limit.figure)
        if value is None or not limit.is_kept(value):
            found = "was not measured" if value is None else f"is {value:,.3f}"
            lines.append(f"MISSED: {limit.figure} {found}; the limit is {limit.sense} {limit.bound:,g}")
    return lines


def exit_status(figures: Mapping[str, float], limits: Sequence[Limit]) -> int:
    """What a benchmark that checks its limits exits with: 1 if one is missed, after saying so on standard error."""
    lines = missed(figures, limits)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0
