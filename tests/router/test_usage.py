"""Both halves of what a client is told of its prompt are of one prompt, whatever its outputs went through."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from baton.v1 import decode_pb2, inference_pb2, prefill_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router import lifetime
from services.router.choice import Choice, ChoiceLimits
from services.router.output_stream import OutputStream
from services.router.tokenizer import Tokenizer
from tests.router.byte_checkpoint import byte_ids, write_byte_checkpoint

MAX_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of one: how many tokens it brought, and what it could say of its prompt and log."""

    num_tokens: int
    cached_share: float | None  # None: it ended before it could say
    is_local: bool


ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        st.integers(0, MAX_TOKENS),
        st.none() | st.floats(0, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_byte_checkpoint(Path(tmp_path_factory.mktemp("checkpoint"))))


def play(choice: Choice, attempt: Attempt, num_prompt_tokens: int) -> None:
    num_cached = int((attempt.cached_share or 0.0) * (num_prompt_tokens + len(choice.tokens) - 1))
    if attempt.cached_share is not None and attempt.is_local:
        lifetime.add_local_prefill(choice.lifetime, decode_pb2.LocalPrefill(num_cached_tokens=num_cached))
    elif attempt.cached_share is not None:
        lifetime.add_prefill(choice.lifetime, prefill_pb2.PrefillCompleted(num_cached_tokens=num_cached))
    choice.accept(byte_ids("abcdef")[: attempt.num_tokens], ())


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.lists(ATTEMPTS, min_size=1, max_size=4))
def test_cached_tokens_are_a_part_of_the_prompt(
    tokenizer: Tokenizer, num_prompt_tokens: int, attempts_of: list[list[Attempt]]
) -> None:
    written: list[inference_pb2.GenerateResponse] = []

    async def write(response: inference_pb2.GenerateResponse) -> None:
        written.append(response)

    output = OutputStream("id", 1, num_prompt_tokens, lambda: 0)
    limits = ChoiceLimits(MAX_TOKENS, frozenset(), (), False, True)
    output.choices = [Choice(index, limits, tokenizer, output.on_change) for index in range(len(attempts_of))]
    for choice, attempts in zip(output.choices, attempts_of, strict=True):
        for number, attempt in enumerate(attempts):
            choice.lifetime.num_migrations = number
            play(choice, attempt, num_prompt_tokens)
        choice.accept(byte_ids("abcdef"), ())
        choice.complete()
    asyncio.run(output.write_to(write, 0))
    usage = written[-1].usage
    assert usage.num_prompt_tokens == num_prompt_tokens
    assert 0 <= usage.num_cached_tokens < num_prompt_tokens
    for response in written:
        assert response.lifetime.num_cached_tokens < num_prompt_tokens
    first = attempts_of[0][0]
    assert usage.num_cached_tokens == int((first.cached_share or 0.0) * (num_prompt_tokens - 1))
