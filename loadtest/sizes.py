"""How long the requests of a workload are: drawn from distributions, or row by row from a trace. Pure and seeded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import InvalidArgument
from loadtest.lengths import Lengths
from loadtest.traces import BLOCK_TOKENS, Trace

_SEED_STREAM = 2  # apart from the streams that draw arrivals and prompts
_DRAWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Size:
    """Lengths of one request, and the blocks that its prompt shares with others."""

    num_prompt_tokens: int
    max_tokens: int
    block_ids: tuple[int, ...] = ()

    def clipped(self, context_length: int) -> Size:
        """Cut to the context: the prompt's end goes first, so that the beginning stays shared."""
        max_tokens = min(self.max_tokens, context_length - 1)
        return Size(min(self.num_prompt_tokens, context_length - max_tokens), max_tokens, self.block_ids)


@dataclass(frozen=True, slots=True)
class RandomSizes:
    """Prompt and output lengths drawn apart from each other. Prompts share nothing."""

    prompt: Lengths
    output: Lengths

    @property
    def num_sizes(self) -> int | None:
        """None: there is always another."""
        return None

    @property
    def largest_tokens(self) -> int | None:
        """Prompt and output of the largest request; None if there is no bound."""
        prompt, output = self.prompt.largest_tokens, self.output.largest_tokens
        return None if prompt is None or output is None else prompt + output

    @property
    def block_tokens(self) -> float:
        """Prompt tokens of a shared block. There are none, so any will do."""
        return BLOCK_TOKENS

    def draw(self, seed: int) -> Iterator[Size]:
        """Sizes without end."""
        generator = np.random.default_rng([seed, _SEED_STREAM])
        while True:
            prompts = self.prompt.draw_tokens(generator, _DRAWS_AT_ONCE)
            outputs = self.output.draw_tokens(generator, _DRAWS_AT_ONCE)
            yield from map(Size, prompts, outputs)

    def name_of(self, index: int) -> str:
        """What an error calls the request."""
        return f"request {index}"

    def describe(self) -> str:
        """In words, for the report."""
        return f"prompts of {self.prompt.describe()} tokens, outputs of {self.output.describe()}"

    def describe_scale(self) -> str:
        """Lengths are what the user asked for: nothing is scaled."""
        return ""


@dataclass(frozen=True, slots=True)
class TraceSizes:
    """The rows of a trace in order, lengths times `length_scale`; their shared blocks shrink or grow alike."""

    trace: Trace
    length_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.length_scale) and self.length_scale > 0):
            raise InvalidArgument("length scale", self.length_scale, "above 0")

    @property
    def num_sizes(self) -> int:
        """Number of rows."""
        return len(self.trace.rows)

    @property
    def largest_tokens(self) -> int:
        """Prompt and output of the largest request."""
        return max(size.num_prompt_tokens + size.max_tokens for size in self.draw(0))

    @property
    def block_tokens(self) -> float:
        """Prompt tokens of a shared block, after scaling."""
        return BLOCK_TOKENS * self.length_scale

    def draw(self, seed: int) -> Iterator[Size]:
        """The rows' sizes. The seed changes nothing."""
        for row in self.trace.rows:
            yield Size(self._scaled(row.num_prompt_tokens), self._scaled(row.num_output_tokens), row.block_ids)

    def name_of(self, index: int) -> str:
        """What an error calls the request: rows are counted from 0."""
        return f"{self.trace.name}, row {self.trace.first_row + index}"

    def describe(self) -> str:
        """In words, for the report."""
        first = self.trace.first_row
        rows = f"{self.trace.name}, rows {first}-{first + len(self.trace.rows) - 1}"
        shared = "shared prefixes kept" if self.trace.rows[0].block_ids else ""
        return ", ".join(filter(None, (rows, self.describe_scale(), shared)))

    def describe_scale(self) -> str:
        """What the user scaled; empty if nothing."""
        return f"lengths × {self.length_scale:g}" if self.length_scale != 1.0 else ""

    def _scaled(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.length_scale))
