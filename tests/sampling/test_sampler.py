"""The batch sampler: distribution, order of operations, replay, independence of rows, and rows that go wrong."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from common.errors import InternalError
from common.sampling import philox
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler, SampleOutput

VOCAB_SIZE = 37  # odd, so that vectorised loops have a tail
GREEDY = SamplingParams(max_tokens=64, seed=0, temperature=0.0)
MIXED_ROWS = (
    GREEDY,
    SamplingParams(max_tokens=64, seed=11),
    SamplingParams(max_tokens=64, seed=12, temperature=0.7, top_p=0.8),
    SamplingParams(max_tokens=64, seed=13, top_k=5, min_p=0.05, logprobs=3),
    SamplingParams(max_tokens=64, seed=14, choice=2, frequency_penalty=0.4, presence_penalty=0.3, top_k=9),
    SamplingParams(max_tokens=64, seed=2**64 - 1, temperature=1.5, repetition_penalty=1.3),
    dataclasses.replace(GREEDY, presence_penalty=1.0, logprobs=0),
    dataclasses.replace(GREEDY, logit_bias=((3, 4.0), (7, -5.0)), min_tokens=6, eos_token_ids=(3,)),
)
PROMPT = [1, 2, 3, 5, 8, 13]


def random_logits(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def sample_one(params: SamplingParams, logits: torch.Tensor, position: int = 0) -> SampleOutput:
    sampler = BatchSampler(logits.shape[-1], 1)
    sampler.add(0, params, PROMPT)
    return sampler.sample([0], logits.view(1, -1), [position])


def logits_of(params: SamplingParams, position: int) -> torch.Tensor:
    """[VOCAB_SIZE]: stands for a model whose logits depend on the sequence and the position only."""
    return random_logits(1, params.seed % 1000 + 1000 * position)[0]


def generate(params: SamplingParams, num_tokens: int) -> list[int]:
    sampler = BatchSampler(VOCAB_SIZE, 1)
    sampler.add(0, params, PROMPT)
    outputs = (sampler.sample([0], logits_of(params, at).view(1, -1), [at]) for at in range(num_tokens))
    return [int(output.token_ids) for output in outputs]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(max_tokens=1, seed=5), 12),
        (SamplingParams(max_tokens=1, seed=6, temperature=0.5), 12),
        (SamplingParams(max_tokens=1, seed=7, top_k=4), 4),
    ],
)
def test_draws_follow_the_softmax(params: SamplingParams, kept: int) -> None:
    logits = torch.linspace(-1.5, 1.5, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    num_rows, num_steps = 100, 40
    sampler = BatchSampler(12, num_rows)
    for row in range(num_rows):
        sampler.add(row, dataclasses.replace(params, choice=row), [])
    counts = torch.zeros(12, dtype=torch.int64)
    for position in range(num_steps):
        batch = logits.expand(num_rows, 12)
        drawn = sampler.sample(range(num_rows), batch, [position] * num_rows).token_ids
        counts += torch.bincount(drawn, minlength=12)
    scaled = logits / params.temperature
    scaled[scaled < scaled.topk(kept).values[-1]] = -torch.inf
    expected = scaled.softmax(-1) * num_rows * num_steps
    allowed = expected > 0
    assert int(counts[~allowed].sum()) == 0
    chi_square = float(((counts - expected)[allowed] ** 2 / expected[allowed]).sum())
    assert chi_square < {12: 31.3, 4: 16.3}[kept]  # 99.9 % with 11 and 3 degrees of freedom


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 1000))
def test_draw_inverts_the_cumulative_distribution_in_id_order(seed: int, position: int) -> None:
    params = SamplingParams(max_tokens=1, seed=seed, temperature=0.8)
    logits = random_logits(1, seed)
    ends = np.cumsum((logits.double() / 0.8).softmax(-1).numpy())
    expected = int(np.searchsorted(ends, philox.uniform(seed, 0, position), side="right"))
    assert int(sample_one(params, logits, position).token_ids) == expected


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    assert int(sample_one(GREEDY, torch.tensor([0.0, 2.0, 1.0, 2.0])).token_ids) == 1


def test_vanishing_temperature_and_top_k_of_one_are_greedy() -> None:
    for seed in range(20):
        logits = random_logits(1, seed)
        for params in (
            SamplingParams(max_tokens=1, seed=seed, temperature=1e-6),
            SamplingParams(max_tokens=1, seed=seed, temperature=2e-5),
            SamplingParams(max_tokens=1, seed=seed, top_k=1),
        ):
            assert int(sample_one(params, logits).token_ids) == int(logits.argmax())


@pytest.mark.parametrize("split", range(0, 13, 3))
@pytest.mark.parametrize("params", MIXED_ROWS)
def test_sequence_resumed_elsewhere_draws_the_same_tokens(params: SamplingParams, split: int) -> None:
    whole = generate(params, 12)
    resumed = BatchSampler(VOCAB_SIZE, 4)
    resumed.add(3, params, PROMPT, whole[:split])
    for position in range(split, 12):
        output = resumed.sample([3], logits_of(params, position).view(1, -1), [position])
        assert int(output.token_ids) == whole[position]


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(len(MIXED_ROWS))), st.integers(1, len(MIXED_ROWS)))
def test_answer_of_a_row_does_not_depend_on_its_neighbours(order: list[int], num_rows: int) -> None:
    sampler = BatchSampler(VOCAB_SIZE, len(MIXED_ROWS))
    batch = order[:num_rows]
    for row in batch:
        sampler.add(row, MIXED_ROWS[row], PROMPT)
    for position in range(3):
        logits = torch.stack([logits_of(MIXED_ROWS[row], position) for row in batch])
        output = sampler.sample(batch, logits, [position] * num_rows)
        for index, row in enumerate(batch):
            alone = BatchSampler(VOCAB_SIZE, 1)
            alone.add(0, MIXED_ROWS[row], PROMPT, generate(MIXED_ROWS[row], position))
            own = alone.sample([0], logits[index : index + 1], [position])
            assert int(output.token_ids[index]) == int(own.token_ids)
            assert output.logprobs[index] == own.logprobs[0]


def test_many_rows_draw_what_few_rows_draw() -> None:
    num_rows = 100  # beyond the size at which random numbers are vectorised
    sampler = BatchSampler(VOCAB_SIZE, num_rows)
    for row in range(num_rows):
        sampler.add(row, SamplingParams(max_tokens=1, seed=row << 57, choice=row), [])
    logits = random_logits(num_rows, 0)
    together = sampler.sample(range(num_rows), logits, range(num_rows)).token_ids.tolist()
    alone = [int(sampler.sample([row], logits[row : row + 1], [row]).token_ids) for row in range(num_rows)]
    assert together == alone


def test_repetition_penalty_is_that_of_transformers() -> None:
    reference = RepetitionPenaltyLogitsProcessor(penalty=1.7)
    params = dataclasses.replace(GREEDY, repetition_penalty=1.7)
    for seed in range(30):
        logits = random_logits(1, seed)
        generated = [int(logits.argmax()), seed % VOCAB_SIZE]
        sampler = BatchSampler(VOCAB_SIZE, 1)
        sampler.add(0, params, PROMPT, generated)
        expected = reference(torch.tensor([PROMPT + generated]), logits.clone())
        assert int(sampler.sample([0], logits, [2]).token_ids) == int(expected.argmax())


def test_frequency_penalty_counts_generated_tokens_and_not_the_prompt() -> None:
    sampler = BatchSampler(4, 1)
    sampler.add(0, dataclasses.replace(GREEDY, frequency_penalty=1.0), [1, 1, 1, 1], [])
    logits = torch.tensor([[0.0, 2.5, 1.0, -9.0]])
    drawn = [int(sampler.sample([0], logits, [position]).token_ids) for position in range(6)]
    # Token 1 falls 2.5, 1.5, 0.5 and is then behind token 2 at 1.0, which falls to 0.0; then 0.5 wins once more.
    assert drawn == [1, 1, 2, 1, 0, 2]


def test_presence_penalty_is_paid_once() -> None:
    sampler = BatchSampler(3, 1)
    sampler.add(0, dataclasses.replace(GREEDY, presence_penalty=1.0), [0], [])
    logits = torch.tensor([[2.0, 1.5, -9.0]])
    assert [int(sampler.sample([0], logits, [at]).token_ids) for at in range(5)] == [0, 1, 0, 0, 0]


def test_bias_comes_before_the_penalties() -> None:
    params = dataclasses.replace(GREEDY, repetition_penalty=2.0, logit_bias=((1, 3.0),))
    # (1 + 3) / 2 = 2 loses to 3; a penalty before the bias would give 1 / 2 + 3 = 3.5 and win.
    assert int(sample_one(params, torch.tensor([3.0, 1.0] + [0.0] * 12)).token_ids) == 0


def test_no_ending_token_before_min_tokens() -> None:
    params = dataclasses.replace(GREEDY, min_tokens=2, stop_token_ids=(0,), eos_token_ids=(1,))
    sampler = BatchSampler(3, 1)
    sampler.add(0, params, [])
    logits = torch.tensor([[5.0, 4.0, 1.0]])
    assert [int(sampler.sample([0], logits, [at]).token_ids) for at in range(3)] == [2, 2, 0]
    sampler.remove(0)
    sampler.add(0, dataclasses.replace(params, ignore_eos=True), [])
    assert int(sampler.sample([0], logits, [0]).token_ids) == 1


def test_logprobs_are_those_of_the_raw_logits() -> None:
    params = SamplingParams(
        max_tokens=1, seed=1, temperature=0.3, top_k=2, logit_bias=((4, 50.0),), presence_penalty=1, logprobs=5
    )
    logits = random_logits(1, 4)
    output = sample_one(params, logits)
    expected = logits[0].log_softmax(-1)
    reported = output.logprobs[0]
    assert reported is not None
    assert int(output.token_ids) == 4
    assert reported[0] == pytest.approx(float(expected[4]))
    assert [token_id for token_id, _ in reported[1]] == expected.topk(5).indices.tolist()
    assert [logprob for _, logprob in reported[1]] == pytest.approx(expected.topk(5).values.tolist())


def test_logprobs_of_zero_alternatives_report_the_chosen_token_alone() -> None:
    reported = sample_one(dataclasses.replace(GREEDY, logprobs=0), torch.zeros(8)).logprobs[0]
    assert reported is not None
    assert reported[0] == pytest.approx(-math.log(8))
    assert reported[1] == []
    assert sample_one(GREEDY, torch.zeros(8)).logprobs == [None]


def test_equal_alternatives_are_listed_by_id() -> None:
    reported = sample_one(dataclasses.replace(GREEDY, logprobs=3), torch.zeros(8)).logprobs[0]
    assert reported is not None
    ids = [token_id for token_id, _ in reported[1]]
    assert ids == sorted(ids)


@pytest.mark.parametrize("params", MIXED_ROWS)
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf] * VOCAB_SIZE], ids=["nan", "inf", "empty"])
def test_bad_row_is_reported_and_its_neighbours_go_on(params: SamplingParams, bad: list[float]) -> None:
    sampler = BatchSampler(VOCAB_SIZE, len(MIXED_ROWS) + 1)
    for row, neighbour in enumerate(MIXED_ROWS):
        sampler.add(row, neighbour, PROMPT)
    sampler.add(len(MIXED_ROWS), params, PROMPT)
    logits = torch.stack([logits_of(neighbour, 0) for neighbour in (*MIXED_ROWS, params)])
    logits[-1, : len(bad)] = torch.tensor(bad)
    output = sampler.sample(range(len(MIXED_ROWS) + 1), logits, [0] * (len(MIXED_ROWS) + 1))
    assert list(output.invalid) == [len(MIXED_ROWS)]
    assert output.token_ids.tolist() == [*(generate(neighbour, 1)[0] for neighbour in MIXED_ROWS), 0]


def test_row_whose_every_token_is_excluded_is_reported() -> None:
    params = SamplingParams(max_tokens=9, seed=0, min_tokens=3, stop_token_ids=(0, 1))
    logits = torch.tensor([1.0, 2.0, -torch.inf])
    assert list(sample_one(params, logits).invalid) == [0]
    assert sample_one(params, logits, position=3).invalid == frozenset()


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 20:22] = 0.0
    drawn = {int(sample_one(MIXED_ROWS[1], logits, position).token_ids) for position in range(30)}
    assert drawn == {20, 21}


def test_logits_are_left_as_they_are() -> None:
    sampler = BatchSampler(VOCAB_SIZE, len(MIXED_ROWS))
    for row, params in enumerate(MIXED_ROWS):
        sampler.add(row, params, PROMPT)
    logits = random_logits(len(MIXED_ROWS), 1)
    before = logits.clone()
    sampler.sample(range(len(MIXED_ROWS)), logits, [0] * len(MIXED_ROWS))
    assert torch.equal(logits, before)


def test_row_given_back_forgets_its_penalties() -> None:
    params = dataclasses.replace(GREEDY, presence_penalty=2.0, repetition_penalty=3.0)
    sampler = BatchSampler(3, 2)
    sampler.add(1, params, [0], [0, 0])
    sampler.remove(1)
    sampler.add(1, params, [], [])
    assert int(sampler.sample([1], torch.tensor([[1.0, 0.9, 0.0]]), [0]).token_ids) == 0


def test_misuse_is_an_internal_error() -> None:
    sampler = BatchSampler(3, 2)
    sampler.add(0, GREEDY, [])
    with pytest.raises(InternalError, match="is taken"):
        sampler.add(0, GREEDY, [])
    with pytest.raises(InternalError, match="not taken"):
        sampler.remove(1)
    with pytest.raises(InternalError, match="vocabulary of 3"):
        sampler.sample([0], torch.zeros(1, 4), [0])
