"""The decoder over shuffled blocks against transformers, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.paged_run import load_decoder, load_reference, paged_logprobs, random_tokens, reference_logprobs
from tests.models.tiny_checkpoints import FAMILIES, VOCAB_SIZE, write_tiny_checkpoint

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for own, reference in zip(actual, expected, strict=True):
        assert (own - reference).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decode_steps_agree_with_transformers(family: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(family, tmp_path, seed=1)
    sequences = [random_tokens(length, VOCAB_SIZE, seed=length) for length in (90, 37, 5)]
    chunks = [[40, 16, 4], [1, 20, 0], [48, 0, 0]]  # a decode step beside chunks, unaligned chunk ends
    decode_steps = [[1, 0, 0], [0, 1, 1]]
    reference = load_reference(path)
    expected = [reference_logprobs(reference, sequence) for sequence in sequences]
    assert_close(paged_logprobs(load_decoder(path), sequences, chunks + decode_steps, seed=3), expected)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint("mistral_window", tmp_path_factory.mktemp("mistral_window"), seed=2)


def test_a_window_is_kept_when_decoding_far_beyond_it(windowed: Path) -> None:
    sequences = [random_tokens(150, VOCAB_SIZE, seed=1), random_tokens(70, VOCAB_SIZE, seed=2)]
    steps = [[140, 65]] + [[1, 1]] * 5 + [[1, 0]] * 5
    reference = load_reference(windowed)
    expected = [reference_logprobs(reference, sequence) for sequence in sequences]
    assert_close(paged_logprobs(load_decoder(windowed), sequences, steps, seed=5), expected)


def test_a_sequence_does_not_see_its_neighbours(windowed: Path) -> None:
    decoder = load_decoder(windowed)
    sequence = random_tokens(40, VOCAB_SIZE, seed=9)
    neighbour = random_tokens(60, VOCAB_SIZE, seed=10)
    steps = [[30, 55]] + [[1, 0]] * 5 + [[1, 1]] * 5
    beside = paged_logprobs(decoder, [sequence, neighbour], steps, seed=6)[0]
    alone = paged_logprobs(decoder, [sequence], [[count] for count, _ in steps], seed=7)[0]
    assert_close([beside], [alone])


def test_a_large_decode_batch_is_cut_into_pieces_without_a_trace(
    windowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.kernels.attention_reference._PIECE_ELEMENTS", 20_000)
    decoder = load_decoder(windowed)
    lengths = [3, 17, 18, 33, 64, 80]
    sequences = [random_tokens(length, VOCAB_SIZE, seed=length) for length in lengths]
    steps = [[length - 1 for length in lengths], [1] * len(lengths)]
    alone = [paged_logprobs(decoder, [sequence], [[len(sequence) - 1], [1]], seed=1)[0] for sequence in sequences]
    assert_close(paged_logprobs(decoder, sequences, steps, seed=2), alone)


def test_bfloat16_stays_near_float32(windowed: Path) -> None:
    sequence = random_tokens(60, VOCAB_SIZE, seed=3)
    exact = paged_logprobs(load_decoder(windowed), [sequence], [[55]] + [[1]] * 5, seed=1)[0]
    rough_decoder = load_decoder(windowed, dtype=torch.bfloat16)
    rough = paged_logprobs(rough_decoder, [sequence], [[55]] + [[1]] * 5, seed=1)[0]
    difference = (exact - rough).abs().mean().item()
    assert 0.0 < difference < 0.1
