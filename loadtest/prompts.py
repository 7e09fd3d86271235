"""Prompts as token ids: seeded, of an exact length, sharing exactly the prefixes that a trace says. Pure.

Each block id of a trace stands for tokens of its own, the same in every prompt; what no block covers is the request's
alone. Ids come from the middle of the vocabulary: special tokens stand at its ends. Knows no tokenizer and no text.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidArgument
from loadtest.workload import PlannedRequest

_BLOCK_STREAM, _REQUEST_STREAM, _WARMUP_STREAM = 3, 4, 5  # apart from those of arrivals and lengths
_MIN_VOCAB_SIZE = 64


class PromptSpec(msgspec.Struct, frozen=True):
    """What prompts are made from, besides the request itself."""

    seed: int
    vocab_size: int
    block_tokens: float  # prompt tokens that one block id stands for, after scaling; need not be whole
    excluded_ids: tuple[int, ...] = ()  # end-of-sequence tokens

    def __post_init__(self) -> None:
        if self.vocab_size < _MIN_VOCAB_SIZE:
            raise InvalidArgument("vocabulary size", self.vocab_size, f"at least {_MIN_VOCAB_SIZE}")


class PromptMaker:
    """Makes the prompt of a planned request; the same request always gets the same prompt."""

    def __init__(self, spec: PromptSpec) -> None:
        self._spec = spec
        low, high = spec.vocab_size // 8, spec.vocab_size - spec.vocab_size // 8
        self._ids = np.setdiff1d(np.arange(low, high, dtype=np.uint32), np.array(spec.excluded_ids, dtype=np.uint32))

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """Exactly `request.num_prompt_tokens` ids."""
        pieces = []
        num_left = request.num_prompt_tokens
        for position, block_id in enumerate(request.block_ids):
            start, end = (round(index * self._spec.block_tokens) for index in (position, position + 1))
            # Drawn whole and then cut: a short last block is the beginning of the full one.
            pieces.append(self._draw(_BLOCK_STREAM, block_id, end - start)[:num_left])
            num_left -= len(pieces[-1])
            if not num_left:
                break
        if num_left:
            stream = _WARMUP_STREAM if request.is_warmup else _REQUEST_STREAM
            pieces.append(self._draw(stream, request.index, num_left))
        ids: list[int] = np.concatenate(pieces).tolist()
        return ids

    def _draw(self, stream: int, number: int, count: int) -> NDArray[np.uint32]:
        generator = np.random.default_rng([self._spec.seed, stream, number])
        return self._ids[generator.integers(0, len(self._ids), count)]
