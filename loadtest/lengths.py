"""How long prompts and outputs are when no trace says so: fixed, uniform or lognormal. Pure; the caller brings the
random numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import InvalidArgument

SYNTAX = "N, uniform:LOW:HIGH or lognormal:MEAN:CV, in tokens"


class Lengths(ABC):
    """A distribution of token counts, all of them at least 1."""

    @property
    @abstractmethod
    def largest_tokens(self) -> int | None:
        """The largest count that can be drawn; None if there is no bound."""

    @abstractmethod
    def draw_tokens(self, generator: np.random.Generator, count: int) -> list[int]:
        """Draw `count` lengths."""

    @abstractmethod
    def describe(self) -> str:
        """In words, for the report."""


@dataclass(frozen=True, slots=True)
class Fixed(Lengths):
    """Always the same."""

    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise InvalidArgument("length", self.num_tokens, "at least 1 token")

    @property
    def largest_tokens(self) -> int:
        return self.num_tokens

    def draw_tokens(self, generator: np.random.Generator, count: int) -> list[int]:
        return [self.num_tokens] * count

    def describe(self) -> str:
        return f"{self.num_tokens}"


@dataclass(frozen=True, slots=True)
class Uniform(Lengths):
    """Each count from low to high, both included, as likely as any other."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise InvalidArgument("length", f"{self.low} to {self.high}", "1 <= LOW <= HIGH tokens")

    @property
    def largest_tokens(self) -> int:
        return self.high

    def draw_tokens(self, generator: np.random.Generator, count: int) -> list[int]:
        drawn: list[int] = generator.integers(self.low, self.high, count, endpoint=True).tolist()
        return drawn

    def describe(self) -> str:
        return f"uniform {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class LogNormal(Lengths):
    """Many short ones and a long tail, given by its mean and its coefficient of variation."""

    mean_tokens: float
    cv: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean_tokens) and self.mean_tokens >= 1):
            raise InvalidArgument("length", self.mean_tokens, "a mean of at least 1 token")
        if not (math.isfinite(self.cv) and self.cv > 0):
            raise InvalidArgument("length", self.cv, "a coefficient of variation above 0")

    @property
    def largest_tokens(self) -> None:
        return None

    def draw_tokens(self, generator: np.random.Generator, count: int) -> list[int]:
        variance = math.log1p(self.cv**2)
        drawn = generator.lognormal(math.log(self.mean_tokens) - variance / 2, math.sqrt(variance), count)
        rounded: list[int] = np.maximum(1, np.rint(drawn)).astype(np.int64).tolist()
        return rounded

    def describe(self) -> str:
        return f"lognormal, mean {self.mean_tokens:g}, CV {self.cv:g}"


_FORMS: dict[str, tuple[int, Callable[[list[str]], Lengths]]] = {
    "fixed": (1, lambda parts: Fixed(int(parts[0]))),
    "uniform": (2, lambda parts: Uniform(int(parts[0]), int(parts[1]))),
    "lognormal": (2, lambda parts: LogNormal(float(parts[0]), float(parts[1]))),
}


def parse_lengths(flag: str, text: str) -> Lengths:
    """The distribution that `text` (see SYNTAX) describes. Raises `InvalidArgument` naming the flag."""
    name, *parts = text.split(":")
    if not parts:
        name, parts = "fixed", [name]
    if name not in _FORMS or len(parts) != _FORMS[name][0]:
        raise InvalidArgument(flag, text, SYNTAX)
    make = _FORMS[name][1]
    try:
        return make(parts)
    except ValueError as error:
        raise InvalidArgument(flag, text, SYNTAX) from error
    except InvalidArgument as error:
        raise InvalidArgument(flag, text, error.limit) from error
