"""What a rank computes with, built once from its `StartRank`: process group, weights, KV blocks, sampler, runner."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch

from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup
from common.sampling.sampler import BatchSampler
from common.worker.model_runner import ModelRunner, Runner
from common.worker.rank_messages import StartRank
from common.worker.step_marks import StepMarks
from common.worker.worker_model import read_worker_model

_DEVICE_RUNNER: Final = "common.worker.device_runner"  # imports Triton, which processes without a GPU never load
_COLLECTIVE_TIMEOUT_S = (
    60.0  # meeting at start, and every collective: a rank that is gone is noticed by the front first
)


@dataclass(frozen=True, slots=True)
class RankRuntime:
    """One rank's state on its device. `storage` is shared with the KV thread; everything else is the step thread's."""

    device: torch.device
    runner: Runner
    storage: KVStorage
    layout_fingerprint: str
    num_parameters: int
    marks: StepMarks | None = None  # where chunks of prompts are computed to be sent

    @property
    def kv_bytes(self) -> int:
        return self.storage.num_bytes


def build_runtime(start: StartRank) -> RankRuntime:
    """Meet the other ranks, load this rank's shard, reserve its blocks. Raises `ModelError`, `Unavailable`."""
    torch.set_num_threads(1)  # one thread per rank: see docs/performance.md
    device = _device(start)
    model_dir = Path(start.model_dir)
    model = read_worker_model(
        model_dir, start.device, start.dtype, start.block_size, start.tp_size, start.random_weights
    )
    group = TensorParallelGroup.open(start.rank, start.tp_size, start.group_address, device, _COLLECTIVE_TIMEOUT_S)
    dtype: torch.dtype = getattr(torch, model.dtype)
    source = None if start.random_weights else model_dir
    decoder = Decoder.load(source, model.config, dtype, device, group)
    storage = KVStorage(
        num_layers=model.config.num_layers,
        num_blocks=start.num_blocks,
        num_kv_heads=len(decoder.shard.kv_heads),
        block_size=start.block_size,
        head_dim=model.config.head_dim,
        dtype=dtype,
        device=device,
    )
    marks = None if start.captures_steps else StepMarks(device)
    make_runner = _device_runner if device.type == "cuda" else _runner
    runner = make_runner(decoder, storage, start, marks)
    return RankRuntime(device, runner, storage, model.fingerprint, decoder.num_parameters, marks)


def _runner(decoder: Decoder, storage: KVStorage, start: StartRank, marks: StepMarks | None) -> Runner:
    sampler = BatchSampler(decoder.config.vocab_size, start.max_rows, decoder.device)
    return ModelRunner(decoder, storage, sampler, start.max_rows, marks)


def _device_runner(decoder: Decoder, storage: KVStorage, start: StartRank, marks: StepMarks | None) -> Runner:
    """Steps of the kinds that `StartRank` names are captured; the largest that is not is run once, to compile."""
    module = importlib.import_module(_DEVICE_RUNNER)
    graph_sizes = None if start.captures_steps else ()
    runner = module.DeviceRunner(
        decoder,
        storage,
        start.max_rows,
        graph_sizes=graph_sizes,
        marks=marks,
        chunk_tokens=start.captured_chunk_tokens,
        prompts_alone=not start.captures_steps,
    )
    runner.warm_up(start.max_step_tokens)
    return cast(Runner, runner)


def _device(start: StartRank) -> torch.device:
    if start.device != "cuda":
        return torch.device(start.device)
    device = torch.device("cuda", start.first_device + start.rank)
    torch.cuda.set_device(device)
    return device
