"""Counters of one process: declared once with how Prometheus sees them, counted by anybody, read by status and scrapes.

Plain integers: counting is one addition. A name that was not declared is an error, so that a counter cannot be lost to
a typo. Knows no service and no exposition format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SECONDS_PER_NS = 1e-9


@dataclass(frozen=True, slots=True)
class CounterSpec:
    """How Prometheus sees a counter: one series of a family, in its base unit (what is counted, times `scale`)."""

    family: str  # without prefix and without `_total`
    help: str
    labels: tuple[tuple[str, str], ...] = ()
    scale: float = 1.0


def by_label(family: str, text: str, label: str, names: Mapping[str, str]) -> dict[str, CounterSpec]:
    """Counters that are one family: `names` says for each value of the label which counter it is."""
    return {name: CounterSpec(family, text, ((label, value),)) for value, name in names.items()}


class Counters:
    """Monotonic counters by name. `specs` is what they were declared with; read it, never change it."""

    def __init__(self, specs: Mapping[str, CounterSpec]) -> None:
        self.specs = dict(specs)
        self._values = dict.fromkeys(specs, 0)

    def declare(self, name: str, spec: CounterSpec) -> None:
        """One more counter: of a label whose values are not all known in advance. No effect if it is there."""
        # The spec first: a scrape may come in between, on its own thread.
        self.specs.setdefault(name, spec)
        self._values.setdefault(name, 0)

    def inc(self, name: str, n: int = 1) -> None:
        """Add to a declared counter."""
        assert n >= 0, f"counter {name} cannot go back"
        self._values[name] += n

    def snapshot(self) -> dict[str, int]:
        """Every counter by name, zeros included. May be called on any thread."""
        return dict(self._values)
