"""The digest of a payload: what it must catch, and that its value is part of the protocol."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels.blocks_reference import DIGEST_PIECE_WORDS, payload_digest

NUM_WORDS = DIGEST_PIECE_WORDS + 300  # more than one piece, the last one short
WORDS = torch.randint(-(2**63), 2**63 - 1, (NUM_WORDS,), generator=torch.Generator().manual_seed(3))
DIGEST = payload_digest(WORDS)


def plain_digest(words: list[int]) -> int:
    """The formula of the module's docstring, word by word."""
    mask = (1 << 64) - 1

    def mix(index: int) -> int:
        z = (index + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    total = 0
    for index, word in enumerate(words):
        piece, place = divmod(index, DIGEST_PIECE_WORDS)
        unsigned = word & mask
        total += (unsigned ^ unsigned >> 32) * (mix(place) | 1) * (mix(piece) | 1)
    return total & mask


def test_the_digest_is_its_formula() -> None:
    assert plain_digest(WORDS.tolist()) == DIGEST


def test_the_digest_is_fixed_by_the_protocol() -> None:
    assert payload_digest(torch.arange(100, dtype=torch.int64)) == plain_digest(list(range(100)))
    assert payload_digest(torch.arange(4, dtype=torch.int64)) == 0xAAD2_68FD_C347_F986


@settings(deadline=None, max_examples=200)
@given(word=st.integers(0, NUM_WORDS - 1), bit=st.integers(0, 63))
def test_any_flipped_bit_is_caught(word: int, bit: int) -> None:
    damaged = WORDS.clone()
    damaged[word] ^= -(2**63) if bit == 63 else 1 << bit
    assert payload_digest(damaged) != DIGEST


@settings(deadline=None, max_examples=100)
@given(
    first=st.integers(0, NUM_WORDS - 1),
    second=st.integers(0, NUM_WORDS - 1),
    bits=st.tuples(st.integers(0, 63), st.integers(0, 63)),
)
def test_two_flipped_bits_are_caught(first: int, second: int, bits: tuple[int, int]) -> None:
    damaged = WORDS.clone()
    for word, bit in {(first, bits[0]), (second, bits[1])}:
        damaged[word] ^= -(2**63) if bit == 63 else 1 << bit
    assert payload_digest(damaged) != DIGEST


@settings(deadline=None, max_examples=100)
@given(first=st.integers(0, NUM_WORDS - 1), second=st.integers(0, NUM_WORDS - 1))
def test_swapped_words_are_caught(first: int, second: int) -> None:
    damaged = WORDS.clone()
    damaged[[first, second]] = WORDS[[second, first]]
    assert (payload_digest(damaged) == DIGEST) == (first == second)


@pytest.mark.parametrize("fill", [0, -1])
def test_a_word_that_was_overwritten_with_a_constant_is_caught(fill: int) -> None:
    for word in (0, 1, DIGEST_PIECE_WORDS, NUM_WORDS - 1):
        damaged = WORDS.clone()
        damaged[word] = fill
        assert payload_digest(damaged) != DIGEST


def test_a_word_of_ones_among_zeros_is_told_by_its_place() -> None:
    payloads = [torch.zeros(8, dtype=torch.int64) for _ in range(9)]
    for word in range(8):
        payloads[word][word] = -1
    assert len({payload_digest(payload) for payload in payloads}) == 9
