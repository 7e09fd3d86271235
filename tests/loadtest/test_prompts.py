"""Prompts are of the exact length, share exactly what the trace says, and never hold a special token."""

from __future__ import annotations

import itertools

import pytest

from common.errors import InvalidArgument
from loadtest.prompts import PromptMaker, PromptSpec
from loadtest.workload import PlannedRequest


def _request(index: int, num_tokens: int, *block_ids: int, is_warmup: bool = False) -> PlannedRequest:
    return PlannedRequest(index, 0.0, num_tokens, 1, block_ids, is_warmup)


def _num_shared(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_lengths_are_exact() -> None:
    prompts = PromptMaker(PromptSpec(0, 4096, 512))
    for num_tokens, ids in ((1, (0,)), (511, (0,)), (512, (0,)), (513, (0, 1)), (1400, (0, 1, 2)), (77, ())):
        assert len(prompts.token_ids(_request(0, num_tokens, *ids))) == num_tokens


@pytest.mark.parametrize("block_tokens", [512, 25.6, 1.1])
def test_equal_block_ids_are_equal_tokens_and_different_ones_differ_at_once(block_tokens: float) -> None:
    prompts = PromptMaker(PromptSpec(3, 100_000, block_tokens))
    num_tokens = round(4 * block_tokens)
    one = prompts.token_ids(_request(0, num_tokens, 7, 8, 9, 10))
    other = prompts.token_ids(_request(1, num_tokens, 7, 8, 19, 20))
    assert len(one) == len(other) == num_tokens
    assert _num_shared(one, other) == round(2 * block_tokens)


def test_a_short_last_block_is_the_beginning_of_the_full_one() -> None:
    prompts = PromptMaker(PromptSpec(3, 4096, 512))
    assert prompts.token_ids(_request(0, 600, 1, 2)) == prompts.token_ids(_request(1, 1024, 1, 2))[:600]


def test_requests_without_blocks_share_nothing_not_even_with_warm_up() -> None:
    prompts = PromptMaker(PromptSpec(3, 100_000, 512))
    made = [prompts.token_ids(_request(index, 50, is_warmup=warm)) for index in range(3) for warm in (False, True)]
    assert all(_num_shared(one, other) < 3 for i, one in enumerate(made) for other in made[:i])


def test_the_seed_decides() -> None:
    request = _request(4, 64, 1)
    assert PromptMaker(PromptSpec(1, 4096, 32)).token_ids(request) == PromptMaker(PromptSpec(1, 4096, 32)).token_ids(
        request
    )
    assert PromptMaker(PromptSpec(1, 4096, 32)).token_ids(request) != PromptMaker(PromptSpec(2, 4096, 32)).token_ids(
        request
    )


def test_ids_come_from_the_middle_of_the_vocabulary_without_the_excluded_ones() -> None:
    prompts = PromptMaker(PromptSpec(0, 80, 512, excluded_ids=(0, 20, 40)))
    assert set(prompts.token_ids(_request(0, 5000))) == set(range(10, 70)) - {20, 40}


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="vocabulary size"):
        PromptSpec(0, 8, 512)
