"""Seeded requests alone and in a batch: what is counted, and that both engines are driven to the same outputs."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from benchmarks.random_model import random_decoder, random_storage
from benchmarks.seeded import Model, Request, make_model, make_requests, measure, outputs
from benchmarks.seeded_agreement import compare
from benchmarks.seeded_draws import _device_sampler, _host_sampler, check_draws
from benchmarks.tensor_parallel_engine import KERNELS, small_config
from common.kernels import reference
from common.kernels.backend import KernelBackend
from common.models.config import ModelConfig
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.device_runner import DeviceRunner
from common.worker.model_runner import ModelRunner

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REQUESTS = [
    SamplingParams(max_tokens=4, seed=(1 << 63) + 7 * n, choice=n % 3, top_p=(1.0, 0.95)[n % 2]) for n in range(6)
]


def tiny_config() -> ModelConfig:
    return dataclasses.replace(small_config(rehearses=True), num_layers=1, windows=(None,), vocab_size=257)


def make_tiny_requests(num_requests: int, num_tokens: int) -> list[Request]:
    return make_requests([(7 * n) % 257 for n in range(400)], num_requests, num_tokens)


def test_agreement_counts_to_the_first_difference() -> None:
    own = [[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1], [2, 2, 2, 2]]
    other = [[1, 2, 3, 4], [5, 0, 7, 0], [1, 1, 1, 0], [2, 2, 2, 2]]
    agreement = compare(own, other)
    assert agreement.first_differences == (1, 3)
    assert agreement.differing == 0.5
    assert agreement.tokens_before == (4 + 1 + 3 + 4) / 16
    assert agreement.num_compared == 14
    assert agreement.rate == f"{2 / 14:.1e}"
    assert agreement.histogram() == [0, 1, 0, 1]


def test_where_nothing_differs_the_rate_is_a_bound() -> None:
    agreement = compare([[1] * 10] * 30, [[1] * 10] * 30)
    assert (agreement.differing, agreement.tokens_before, agreement.rate) == (0.0, 1.0, "< 1.0e-02")
    assert "–" in agreement.markdown("same")


@pytest.mark.parametrize("others", [[[1, 2]], [[1, 2], [1]], [[1, 2], [1, 2, 3]]])
def test_outputs_of_other_shapes_are_refused(others: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare([[1, 2], [3, 4]], others)


def test_draws_follow_the_counters_in_every_batch() -> None:
    assert check_draws(CPU, 1000, REQUESTS, batch=4, num_tokens=5) == 30


def test_a_sampler_whose_numbers_depend_on_the_row_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = BatchSampler.sample

    def sample_by_row(self: BatchSampler, rows: range, logits: torch.Tensor, positions: list[int]) -> object:
        return sample(self, rows, logits, [position + row for row, position in zip(rows, positions, strict=True)])

    monkeypatch.setattr(BatchSampler, "sample", sample_by_row)
    with pytest.raises(AssertionError, match="in batches of 4 other random numbers"):
        check_draws(CPU, 1000, REQUESTS, batch=4, num_tokens=5)


@pytest.mark.gpu
def test_the_sampler_of_captured_steps_draws_as_the_host_does() -> None:
    logits = torch.randn((len(REQUESTS), 300), generator=torch.Generator().manual_seed(1)) * 3
    for flat in (logits, torch.zeros_like(logits)):
        device, host = _device_sampler(DEVICE, 300, REQUESTS), _host_sampler(CPU, 300, REQUESTS)
        assert [device(flat.to(DEVICE), at) for at in range(3)] == [host(flat, at) for at in range(3)]


def test_requests_are_whole_pieces_of_the_text_with_two_kinds_of_sampling() -> None:
    requests = make_requests(list(range(300)), 20, 32)
    assert all(16 <= len(r.prompt) <= 128 and r.prompt[-1] - r.prompt[0] == len(r.prompt) - 1 for r in requests)
    assert [r.sampling.top_p for r in requests] == [1.0, 0.95] * 10
    assert len({r.sampling.seed for r in requests}) == 20
    assert max(r.sampling.seed for r in requests) > 1 << 62


def test_measuring_compares_both_kinds_and_the_control() -> None:
    decoder = random_decoder(tiny_config(), CPU, torch.float32)
    found = measure(make_model("tiny", decoder, 4, 3), make_tiny_requests(6, 3), 4, 3)
    assert {name: (a.num_requests, a.num_tokens) for name, a in found.items()} == {
        "temperature 1": (3, 3),
        "top-p 0.95": (3, 3),
        "the same batch again": (6, 3),
    }
    assert found["the same batch again"].differing == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_the_gpu_engine_is_driven_to_the_outputs_of_the_cpus() -> None:
    """Both on one device, as another draws other weights."""
    config = tiny_config()
    requests = make_tiny_requests(3, 3)
    num_blocks = make_model("tiny", random_decoder(config, CPU, torch.float32), 3, 3).num_blocks
    plain = random_decoder(config, DEVICE, torch.float32, cast(KernelBackend, reference), seed=2)
    sampler = BatchSampler(config.vocab_size, 3, DEVICE)
    host = ModelRunner(plain, random_storage(plain, num_blocks), sampler, 3)
    decoder = random_decoder(config, DEVICE, torch.float32, KERNELS, seed=2)
    runner = DeviceRunner(decoder, random_storage(decoder, num_blocks), 3, graph_sizes=(1, 3))
    captured = Model("captured", runner, num_blocks, config.vocab_size, DEVICE)
    expected = outputs(Model("reference", host, num_blocks, config.vocab_size, DEVICE), requests, 3, 3)
    assert outputs(captured, requests, 1, 3) == outputs(captured, requests, 3, 3) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3
