"""A rank's engine with random weights; its decode steps and prefill are timed.

Steps go through the runner as plans, two under way at a time, as in a worker.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.random_model import BLOCK_SIZE, Front, random_storage
from benchmarks.step_times import percentile
from common.models.decoder import Decoder
from common.worker.device_runner import DeviceRunner
from common.worker.device_step import DeviceStep
from common.worker.step_plan import StepPlan

BYTES_PER_S: Final = 4.3e12
FLOP_PER_S: Final = 780e12
STEPS_UNDER_WAY: Final = 2
SPARE_BYTES: Final = 8 << 30  # for graphs, workspaces and what a step of 8,192 tokens keeps while it runs


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Milliseconds. `graph_ms`: replays without plans between them; `idle`: the share of a step beyond that."""

    context: int
    batch: int
    median_ms: float
    p99_ms: float
    graph_ms: float
    launch_ms: float  # host time to launch a step
    idle: float
    floor_ms: float


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """One prompt, or several, from the first launch to the last result."""

    num_prompts: int
    num_tokens: int
    chunk: int
    ms: float
    floor_ms: float


class Bench:
    """A model with its blocks."""

    def __init__(self, decoder: Decoder, max_blocks: int, max_rows: int, sizes: tuple[int, ...]) -> None:
        """`sizes` [empty: none]: of decode steps that are captured. Takes fewer blocks where memory is short."""
        self.config, self.decoder = decoder.config, decoder
        self.num_blocks = min(max_blocks, fitting_blocks(decoder))
        self.storage = random_storage(self.decoder, self.num_blocks)
        begun = time.perf_counter()
        self.runner = DeviceRunner(self.decoder, self.storage, max_rows, sizes)
        synchronize(decoder.device)
        seconds = time.perf_counter() - begun
        print(f"{self.num_blocks} blocks; captured {len(sizes)} graphs in {seconds:.1f} s", flush=True)
        self._step_id = 0
        embedding = self.config.vocab_size * self.config.hidden_size
        self._read_parameters = decoder.num_parameters - (0 if self.config.tie_word_embeddings else embedding)
        self._layer_parameters = decoder.num_parameters - (1 + (not self.config.tie_word_embeddings)) * embedding

    def decode(self, context: int, batch: int, num_steps: int) -> DecodeTiming:
        front = Front(self.runner, self.num_blocks)
        for row in range(batch):
            front.add(row, context - num_steps // 2, last_token=row)
        ends, launches = [], []
        under_way: deque[DeviceStep] = deque()
        for plan in self._plans(front, batch, num_steps + 10):
            begun = time.perf_counter()
            under_way.append(self.runner.launch(plan))
            launches.append(time.perf_counter() - begun)
            if len(under_way) == STEPS_UNDER_WAY:
                under_way.popleft().result()
                ends.append(time.perf_counter())
        while under_way:
            under_way.popleft().result()
        periods = [later - earlier for earlier, later in pairwise(ends[10:])]
        graph_ms = self._graph_ms(batch, max(5, min(50, num_steps // 2)))
        for row in range(batch):
            front.remove(row)
        median_ms = statistics.median(periods) * 1e3
        cache = batch * context * self.storage.kv[:, 0].nbytes / BLOCK_SIZE
        return DecodeTiming(
            context, batch, median_ms, percentile(periods, 0.99) * 1e3, graph_ms,
            statistics.median(launches) * 1e3, 1 - graph_ms / median_ms,
            (self._read_parameters * 2 + cache) / BYTES_PER_S * 1e3,
        )  # fmt: skip

    def _plans(self, front: Front, batch: int, num_steps: int) -> Iterator[StepPlan]:
        for _ in range(num_steps):
            self._step_id += 1
            yield StepPlan(self._step_id, [front.segment(row) for row in range(batch)])

    def _graph_ms(self, batch: int, num_replays: int) -> float:
        """The last step again and again. NaN on a CPU, where nothing is captured."""
        if self.decoder.device.type == "cpu":
            return float("nan")
        graphs = self.runner._graphs
        assert graphs is not None
        size = graphs.size_for(batch)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graphs.run(size)
        begin.record()
        for _ in range(num_replays):
            graphs.run(size)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / num_replays

    def prefill(self, num_prompts: int, num_tokens: int, chunk: int, repeat: int = 3) -> PrefillTiming:
        """Chunks as a worker cuts them: up to `chunk` tokens in a step, of one prompt after the other.

        Raises `torch.OutOfMemoryError`; the bench can be used after that.
        """
        times = [self._prefill_s(num_prompts, num_tokens, chunk) for _ in range(repeat + 1)]
        floor = num_prompts * (
            2 * self._layer_parameters * num_tokens
            + 2 * self.config.num_layers * self.config.num_heads * self.config.head_dim * num_tokens**2
        )
        ms = statistics.median(times[1:]) * 1e3
        return PrefillTiming(num_prompts, num_tokens, chunk, ms, floor / FLOP_PER_S * 1e3)

    def _prefill_s(self, num_prompts: int, num_tokens: int, chunk: int) -> float:
        front = Front(self.runner, self.num_blocks)
        for row in range(num_prompts):
            front.add(row, 0)
        synchronize(self.decoder.device)
        begun = time.perf_counter()
        under_way: deque[DeviceStep] = deque()
        try:
            for plan in self._prefill_plans(front, num_prompts, num_tokens, chunk):
                under_way.append(self.runner.launch(plan))
                if len(under_way) > STEPS_UNDER_WAY:
                    under_way.popleft().result()
            while under_way:
                assert not any(token.error for token in under_way.popleft().result().sampled)
        finally:
            for row in range(num_prompts):
                front.remove(row)
        return time.perf_counter() - begun

    def _prefill_plans(self, front: Front, num_prompts: int, num_tokens: int, chunk: int) -> Iterator[StepPlan]:
        tokens = torch.randint(self.config.vocab_size, (num_tokens,)).tolist()
        segments, room = [], chunk
        for row in range(num_prompts):
            done = 0
            while done < num_tokens:
                count = min(room, num_tokens - done)
                segments.append(front.segment(row, tokens[done : done + count], sample=done + count == num_tokens))
                done += count
                room -= count
                if room == 0:
                    yield StepPlan(0, segments)
                    segments, room = [], chunk
        if segments:
            yield StepPlan(0, segments)

    def top_kernels(self, context: int, batch: int, num_rows: int) -> list[tuple[str, int, float]]:
        """Of one captured step: (kernel, calls, microseconds in all), the most expensive first."""
        front = Front(self.runner, self.num_blocks)
        for row in range(batch):
            front.add(row, context, last_token=row)
        for plan in self._plans(front, batch, 3):
            self.runner.launch(plan).result()
        graphs = self.runner._graphs
        assert graphs is not None
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(3):
                graphs.run(graphs.size_for(batch))
            torch.cuda.synchronize()
        for row in range(batch):
            front.remove(row)
        rows = [(event.key, event.count // 3, event.self_device_time_total / 3) for event in recorded.key_averages()]
        return sorted(rows, key=lambda row: row[2], reverse=True)[:num_rows]


def fitting_blocks(decoder: Decoder) -> int:
    """How many blocks fit into the memory that is free, beside what else is needed."""
    if decoder.device.type == "cpu":
        return 1 << 10
    torch.cuda.empty_cache()
    config = decoder.config
    block_bytes = config.num_layers * 2 * len(decoder.shard.kv_heads) * BLOCK_SIZE * config.head_dim
    return (torch.cuda.mem_get_info(decoder.device)[0] - SPARE_BYTES) // (block_bytes * decoder.dtype.itemsize)


def blocks_for(num_rows: int, num_tokens: int) -> int:
    return num_rows * -(-num_tokens // BLOCK_SIZE)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
