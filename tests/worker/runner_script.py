"""Runners on the same checkpoint, and a front's messages for all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.kernels import cuda_backend
from common.kvcache.storage import KVStorage
from common.models import decoder as decoder_module
from common.models.decoder import Decoder
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.model_runner import ModelRunner, Runner
from common.worker.step_plan import AddRow, SampledToken, Segment, StepPlan, pack_tokens
from tests.models.paged_run import BLOCK_SIZE, load_decoder, new_storage, random_tokens
from tests.models.tiny_checkpoints import VOCAB_SIZE

NUM_BLOCKS = 48
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = SamplingParams(max_tokens=100, seed=0, temperature=0.0)
DRAWN = SamplingParams(max_tokens=100, seed=(1 << 63) + 77, choice=2)


def reference_runner(checkpoint: Path, max_rows: int) -> tuple[ModelRunner, KVStorage]:
    """The CPU's runner with the reference kernels, and its blocks."""
    decoder = load_decoder(checkpoint)
    storage = new_storage(decoder, NUM_BLOCKS)
    return ModelRunner(decoder, storage, BatchSampler(VOCAB_SIZE, max_rows), max_rows), storage


def device_parts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, KVStorage]:
    """The model with the GPU's kernels, and blocks full of the same noise as the reference's."""
    reference = load_decoder(checkpoint)
    monkeypatch.setattr(decoder_module, "kernels_for", lambda device: cuda_backend)
    decoder = Decoder.load(checkpoint, reference.config, torch.float32, DEVICE, reference._group)
    config = decoder.config
    storage = KVStorage(
        config.num_layers, NUM_BLOCKS, config.num_kv_heads, BLOCK_SIZE, config.head_dim, torch.float32, DEVICE
    )
    storage.kv.copy_(new_storage(reference, NUM_BLOCKS).kv)
    return decoder, storage


class Script:
    """Gives the same messages to all runners and returns what they agree on."""

    def __init__(self, runners: list[Runner]) -> None:
        self._runners = runners
        self._free = random_tokens(4 * NUM_BLOCKS, NUM_BLOCKS, seed=1)
        self._free = [*dict.fromkeys([*self._free, *range(NUM_BLOCKS)])]
        self._tables: dict[int, list[int]] = {}
        self._ends: dict[int, int] = {}
        self._step_id = 0

    def add(self, row: int, sampling: SamplingParams, outputs: list[int] | None = None, prompt: int = 9) -> None:
        packed = pack_tokens(random_tokens(prompt, VOCAB_SIZE, seed=row))
        for runner in self._runners:
            runner.add_row(AddRow(row, sampling, packed, pack_tokens(outputs or [])))
        self._tables[row], self._ends[row] = [], 0

    def remove(self, row: int) -> None:
        for runner in self._runners:
            runner.remove_row(row)
        self._free += self._tables.pop(row)

    def table(self, row: int) -> list[int]:
        """The row's blocks, those of segments made so far included."""
        return self._tables[row]

    def segment(self, row: int, num_tokens: int = 0, output_index: int = 0, sample: bool = True) -> Segment:
        """A chunk of the prompt, or without `num_tokens` the token sampled last."""
        position = self._ends[row]
        self._ends[row] += max(1, num_tokens)
        new: list[int] = []
        while (len(self._tables[row]) + len(new)) * BLOCK_SIZE < self._ends[row]:
            new.append(self._free.pop())
        self._tables[row] += new
        token_ids = pack_tokens(random_tokens(num_tokens, VOCAB_SIZE, seed=row + position)) if num_tokens else None
        return Segment(row, token_ids, position, new, sample, output_index)

    def run(self, *segments: Segment) -> list[SampledToken]:
        self._step_id += 1
        plan = StepPlan(self._step_id, list(segments))
        first, *others = [runner.launch(plan).result() for runner in self._runners]
        for other in others:
            assert [(t.row, t.token_id, t.error) for t in other.sampled] == [
                (t.row, t.token_id, t.error) for t in first.sampled
            ]
            assert other.compute_ns > 0
        return others[0].sampled
