"""The GPU's engine against plain torch on the same weights: tokens of a small float32 model, logits of a bf16 one."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch

from benchmarks.random_model import BLOCK_SIZE, GREEDY, Front, random_decoder, random_storage, read_shape
from common.kernels import reference
from common.kernels.backend import KernelBackend
from common.kernels.batch import Span
from common.models.decoder import Decoder
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.device_runner import DeviceRunner
from common.worker.model_runner import ModelRunner, Runner
from common.worker.step_plan import StepPlan

_REFERENCE = cast(KernelBackend, reference)
_NUM_BLOCKS = 256
_DRAWN = SamplingParams(max_tokens=1 << 20, seed=1 << 63 | 5, temperature=0.8, top_k=40, top_p=0.9)


def same_tokens(device: torch.device) -> int:
    """How many tokens both runners chose alike, greedy and drawn, in batches that grow and shrink. Raises if not."""
    config = dataclasses.replace(
        read_shape("qwen3-8b", 3), hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2,
        vocab_size=20_000,  # several chunks of the kernel that draws
    )  # fmt: skip
    runs = []
    for kernels in (None, _REFERENCE):
        decoder = random_decoder(config, device, torch.float32, kernels, seed=3)
        torch.manual_seed(5)
        storage = random_storage(decoder, _NUM_BLOCKS)
        runner: Runner
        if kernels is None:
            runner = DeviceRunner(decoder, storage, 8, graph_sizes=(1, 2, 4, 8))
        else:
            runner = ModelRunner(decoder, storage, BatchSampler(config.vocab_size, 8, device), 8)
        runs.append(_tokens(runner))
    if runs[0] != runs[1]:
        raise AssertionError(f"tokens differ: {runs[0]} and {runs[1]}")
    return sum(map(len, runs[0]))


def _tokens(runner: Runner) -> list[list[int]]:
    """One row more in each of the first steps, its prompt in chunks of 100, then a row less in each of the last."""
    front = Front(runner, _NUM_BLOCKS)
    chosen = []
    num_rows = 6
    for step in range(24):
        segments = [front.segment(row) for row in range(max(0, step - 17), min(step // 2, num_rows))]
        row = step // 2
        if row < num_rows:
            if step % 2 == 0:
                front.add(row, 0, None, _DRAWN if row % 2 else GREEDY)
            prompt = [(7 * row + 3 * place) % 2000 for place in range(100 if step % 2 == 0 else 40 + row)]
            segments.append(front.segment(row, prompt, sample=step % 2 == 1))
        result = runner.launch(StepPlan(step, segments)).result()
        assert not any(token.error for token in result.sampled), result
        chosen.append([token.token_id for token in result.sampled])
    return chosen


@torch.inference_mode()
def logit_errors(device: torch.device) -> dict[str, float]:
    """Relative error of bf16 logits against float32 on the same weights: of the engine, of plain torch in bf16."""
    config = read_shape("llama-3.1-8b", 4)
    wide = random_decoder(config, device, torch.float32, _REFERENCE)
    _copy_weights(random_decoder(config, device, torch.bfloat16, _REFERENCE), wide)
    expected = _logits(wide)
    del wide
    errors = {}
    for name, kernels in (("engine", None), ("plain torch", _REFERENCE)):
        logits = _logits(random_decoder(config, device, torch.bfloat16, kernels))
        errors[name] = float((logits - expected).norm() / expected.norm())
    return errors


def _copy_weights(source: Decoder, target: Decoder) -> None:
    """The values of `source`, in the dtype of `target`."""
    pairs = [(source._weights.embedding, target._weights.embedding)]
    pairs += [(source._weights.final_norm, target._weights.final_norm)]
    pairs += [(source._weights.head.weight, target._weights.head.weight)]
    for own, other in zip(source._weights.layers, target._weights.layers, strict=True):
        pairs += [(own.input_norm, other.input_norm), (own.post_norm, other.post_norm)]
        pairs += [(getattr(own, n).weight, getattr(other, n).weight) for n in ("qkv", "o", "gate_up", "down")]
    for values, place in pairs:
        place.copy_(values)


def _logits(decoder: Decoder) -> torch.Tensor:
    """Three sequences: two prompts in two chunks, then two decode steps. [steps * 3, vocab] float32."""
    storage = random_storage(decoder, 64)
    storage.kv.zero_()
    tables = [list(range(first, first + 12)) for first in (3, 20, 40)]
    lengths, parts = [0, 0, 0], []
    device = decoder.device
    for counts in ([100, 300, 7], [28, 211, 130], [1, 1, 1], [1, 1, 1]):
        tokens = [(31 * place + 17 * s) % 5000 for s, n in enumerate(counts) for place in range(n)]
        positions = [lengths[s] + place for s, n in enumerate(counts) for place in range(n)]
        lengths = [length + n for length, n in zip(lengths, counts, strict=True)]
        spans = [Span(n, length, table) for n, length, table in zip(counts, lengths, tables, strict=True)]
        plan = decoder.kernels.plan_batch(spans, {None}, storage.shape, decoder.dtype, device)
        hidden = decoder.forward(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), plan, storage.kv
        )
        ends = torch.tensor(counts).cumsum(0) - 1
        parts.append(decoder.logits(hidden[ends.to(device)]))
    assert max(lengths) <= 12 * BLOCK_SIZE
    return torch.cat(parts)
