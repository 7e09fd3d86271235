"""Philox against the known answers that its authors publish, and the vectorised form against the scalar one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling.philox import Words, as_signed, philox4x32, uniform, uniforms

ONES = 0xFFFFFFFF
draws = st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, ONES), st.integers(0, (1 << 40) - 1))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the philox4x32 10 lines of Random123's kat_vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: Words, key: tuple[int, int], expected: Words) -> None:
    assert philox4x32(counter, key) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(draws, min_size=1, max_size=20))
def test_vectorised_draws_equal_scalar_ones_bit_for_bit(batch: list[tuple[int, int, int]]) -> None:
    seeds = torch.tensor([as_signed(seed) for seed, _, _ in batch])
    choices = torch.tensor([choice for _, choice, _ in batch])
    positions = torch.tensor([position for _, _, position in batch])
    assert uniforms(seeds, choices, positions).tolist() == [uniform(*one) for one in batch]


@settings(deadline=None, max_examples=200)
@given(draws)
def test_uniform_has_53_bits_in_the_unit_interval_led_by_the_first_word(draw: tuple[int, int, int]) -> None:
    seed, choice, position = draw
    value = uniform(seed, choice, position)
    assert 0.0 <= value < 1.0
    assert (value * 2**53).is_integer()
    first_word = philox4x32((position & ONES, position >> 32, choice, 0), (seed & ONES, seed >> 32))[0]
    assert int(value * 2**24) == first_word >> 8


def test_seed_choice_and_position_each_give_another_stream() -> None:
    base = [uniform(1, 0, position) for position in range(8)]
    assert [uniform(1 << 32, 0, position) for position in range(8)] != base
    assert [uniform(1, 1, position) for position in range(8)] != base
    assert len(set(base)) == 8


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    n = 20_000
    zeros = torch.zeros(n, dtype=torch.int64)
    counts = torch.histc(uniforms(zeros + 42, zeros, torch.arange(n)).float(), bins=50, min=0.0, max=1.0)
    chi_square = float(((counts - n / 50) ** 2 / (n / 50)).sum())
    assert chi_square < 85.4  # 99.9 % of a chi-square with 49 degrees of freedom
