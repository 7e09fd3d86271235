"""Outputs may part where rounding decides; those of a cache whose blocks or heads are wrong must not pass for that."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.goodput import SHIPPED
from benchmarks.gpu_path_check import random_prompt
from benchmarks.output_comparison import Output, compare
from benchmarks.random_model import BLOCK_SIZE, Front
from common.kvcache.storage import KVStorage
from common.models.config import read_model_config
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.model_runner import ModelRunner
from common.worker.step_plan import StepPlan

NEAR = {7: -1.00, 8: -1.04, 9: -3.0}  # a rounding away from each other, and one that is not


def output(*tokens: int, at: dict[int, float] = NEAR) -> Output:
    return Output(tokens, [at] * len(tokens))


def test_equal_outputs_are_counted() -> None:
    found = compare([output(7, 8), output(8, 9)], [output(7, 8), output(8, 9)])
    assert (found.num_equal, found.num_outputs, found.largest_margin, found.faults) == (2, 2, 0.0, ())


def test_candidates_that_are_near_may_part_and_what_follows_is_not_compared() -> None:
    found = compare([output(7, 7, 9)], [output(7, 8, 7)])
    assert (found.num_equal, found.faults) == (0, ())
    assert found.largest_margin == pytest.approx(0.04)


def test_candidates_must_be_near_in_both_outputs() -> None:
    far = {7: -2.0, 8: -1.0}
    for outputs, others in (([output(7)], [output(8, at=far)]), ([output(8, at=far)], [output(7)])):
        found = compare(outputs, others)
        assert found.largest_margin == pytest.approx(1.0)
        assert len(found.faults) == 1
    assert compare([output(7)], [output(8, at=far)], tolerance=1.1).faults == ()


@pytest.mark.parametrize("missing", [{8: -1.0}, {8: -1.0, 7: math.nan}])
def test_a_candidate_that_the_other_does_not_know_is_a_fault(missing: dict[int, float]) -> None:
    assert len(compare([output(7)], [output(8, at=missing)]).faults) == 1


def test_drift_before_the_difference_is_reported() -> None:
    moved = {token: logprob - 0.02 for token, logprob in NEAR.items()}
    assert compare([output(7, 8)], [output(7, 8, at=moved)]).largest_drift == pytest.approx(0.02)


def test_outputs_of_other_requests_are_refused() -> None:
    for others in ([], [output(7)], [output(7, 8), output(7)]):
        with pytest.raises(ValueError, match="not outputs of the same requests"):
            compare([output(7, 8)], others)
    with pytest.raises(ValueError, match="2 tokens with 1 positions"):
        Output([7, 8], [NEAR])


def _swap_blocks(kv: torch.Tensor) -> None:
    """A full one and the last, which is partly filled; the order of full ones makes no difference to attention."""
    kv[:, [0, -1]] = kv[:, [-1, 0]]


def _swap_heads(kv: torch.Tensor) -> None:
    kv[:, :, :, [0, 1]] = kv[:, :, :, [1, 0]]


def _lose_last_layer_of_a_block(kv: torch.Tensor) -> None:
    kv[-1, 0] = 0


def _generated(decoder: Decoder, prompt: list[int], damage: Callable[[torch.Tensor], None]) -> Output:
    """What follows the prompt if something happens to its K and V, blocks in order, before the second token."""
    config = decoder.config
    num_blocks = len(prompt) // BLOCK_SIZE + 2
    storage = KVStorage(
        config.num_layers, num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim, decoder.dtype, decoder.device
    )
    runner = ModelRunner(decoder, storage, BatchSampler(config.vocab_size, 1, decoder.device), 1)
    front = Front(runner, num_blocks)
    front.add(0, 0, sampling=SamplingParams(max_tokens=24, seed=0, temperature=0.0, logprobs=20))
    tokens: list[int] = []
    logprobs: list[dict[int, float]] = []
    for step in range(24):
        segment = front.segment(0, None if step else prompt)
        if step == 0:
            order = segment.new_block_ids
        (sampled,) = runner.run(StepPlan(step, [segment])).sampled
        assert sampled.logprob is not None
        assert sampled.top_logprobs is not None
        tokens.append(sampled.token_id)
        logprobs.append({**dict(sampled.top_logprobs), sampled.token_id: sampled.logprob})
        if step == 0:
            blocks = storage.kv[:, order].clone()
            damage(blocks)
            storage.kv[:, order] = blocks
    return Output(tokens, logprobs)


@pytest.mark.parametrize("damage", [_swap_blocks, _swap_heads, _lose_last_layer_of_a_block])
def test_a_wrong_hand_off_is_more_than_rounding(damage: Callable[[torch.Tensor], None]) -> None:
    decoder = Decoder.load(
        SHIPPED, read_model_config(SHIPPED), torch.float32, torch.device("cpu"), TensorParallelGroup.single()
    )
    prompts = [random_prompt(length, decoder.config.vocab_size, seed) for seed, length in enumerate((129, 200, 320))]
    right = [_generated(decoder, prompt, lambda _: None) for prompt in prompts]
    assert compare(right, [_generated(decoder, prompt, lambda _: None) for prompt in prompts]).num_equal == 3
    wrong = compare(right, [_generated(decoder, prompt, damage) for prompt in prompts])
    assert wrong.faults, str(wrong)
