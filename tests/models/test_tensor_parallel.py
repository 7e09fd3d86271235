"""A model split over ranks computes what the whole model computes, on every rank alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.config import read_model_config
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup
from tests.models.paged_run import CPU, load_decoder, paged_logprobs, random_tokens
from tests.models.tiny_checkpoints import VOCAB_SIZE, write_tiny_checkpoint
from tests.parallel.in_process_group import run_ranks

STEPS = [[20, 9], [1, 10], [1, 1]]


def sequences(vocab_size: int) -> list[list[int]]:
    return [random_tokens(22, vocab_size, seed=1), random_tokens(20, vocab_size, seed=2)]


@pytest.mark.parametrize(
    ("family", "size"),
    [("llama_bias", 2), ("llama_tied", 2), ("qwen2", 2), ("qwen3", 4), ("mistral_window", 4)],
)
def test_ranks_agree_with_the_whole_model(family: str, size: int, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "model", seed=5)
    expected = paged_logprobs(load_decoder(path), sequences(VOCAB_SIZE), STEPS, seed=1)

    def body(group: TensorParallelGroup) -> list[torch.Tensor]:
        return paged_logprobs(load_decoder(path, group), sequences(VOCAB_SIZE), STEPS, seed=1)

    ranks = run_ranks(size, tmp_path / "store", body)
    for actual, whole in zip(ranks[0], expected, strict=True):
        assert (actual - whole).abs().max().item() < 1e-4
    for other in ranks[1:]:
        assert all(torch.equal(own, first) for own, first in zip(other, ranks[0], strict=True))


def test_a_vocabulary_that_does_not_divide_is_whole_after_the_gather(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama3", tmp_path / "model", seed=5)
    tensors = load_file(path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:317].contiguous()
    save_file(tensors, path / "model.safetensors")
    config = replace(read_model_config(path), vocab_size=317)

    def body(group: TensorParallelGroup) -> list[torch.Tensor]:
        decoder = Decoder.load(path, config, torch.float32, CPU, group)
        return paged_logprobs(decoder, sequences(317), STEPS, seed=1)

    expected = body(TensorParallelGroup.single())
    for actual, whole in zip(run_ranks(2, tmp_path / "store", body)[0], expected, strict=True):
        assert actual.shape == whole.shape
        assert (actual - whole).abs().max().item() < 1e-4
