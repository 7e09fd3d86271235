"""A rank's engine on one GPU with random weights: checked against plain torch, then decode steps and prefill are timed.

Steps go through the runner as plans, two under way at a time, as in a worker. Prints tables with targets and floors;
needs a GPU with room for the weights and about 70 GB of blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_check import logit_errors, same_tokens
from benchmarks.random_model import BLOCK_SIZE, Front, random_decoder, random_storage, read_shape
from common.models.config import ModelConfig
from common.worker.device_runner import DeviceRunner
from common.worker.device_step import DeviceStep
from common.worker.step_plan import StepPlan

BYTES_PER_S, FLOP_PER_S = 4.3e12, 780e12
STEPS_UNDER_WAY = 2
DECODE_CASES = [(1024, n) for n in (1, 8, 32, 64, 128, 256)] + [(8192, n) for n in (1, 8, 32, 64)]
# Of a Llama-3.1-8B shape: the goal and vLLM 0.25.0 on the same GPU, milliseconds.
_1K_MS = [(4.0, 4.85), (4.4, 5.24), (5.3, 6.54), (6.4, 7.77), (8.8, 10.96), (13.6, 18.71)]
_8K_MS = [(4.3, 5.15), (6.2, 7.0), (12.7, 13.61), (21.8, 23.78)]
DECODE_MS = dict(zip(DECODE_CASES, [*_1K_MS, *_8K_MS], strict=True))
PREFILL_MS = {512: (13, 16.8), 2048: (46, 50.7), 8192: (200, 213.5), 32768: (1130, 1210)}


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

    def __init__(self, config: ModelConfig, num_blocks: int, max_rows: int, sizes: tuple[int, ...]) -> None:
        device = torch.device("cuda")
        self.config = config
        self.decoder = random_decoder(config, device)
        self.storage = random_storage(self.decoder, num_blocks)
        begun = time.perf_counter()
        self.runner = DeviceRunner(self.decoder, self.storage, max_rows, sizes)
        torch.cuda.synchronize()
        print(f"captured {len(sizes)} graphs in {time.perf_counter() - begun:.1f} s", flush=True)
        self._num_blocks = num_blocks
        self._step_id = 0
        embedding = config.vocab_size * config.hidden_size
        self._read_parameters = self.decoder.num_parameters - (0 if config.tie_word_embeddings else embedding)
        self._layer_parameters = self.decoder.num_parameters - (1 + (not config.tie_word_embeddings)) * embedding

    def decode(self, context: int, batch: int, num_steps: int) -> DecodeTiming:
        front = Front(self.runner, self._num_blocks)
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
        periods = sorted(later - earlier for earlier, later in pairwise(ends[10:]))
        graph_ms = self._graph_ms(batch, max(5, min(50, num_steps // 2)))
        for row in range(batch):
            front.remove(row)
        median_ms = statistics.median(periods) * 1e3
        cache = batch * context * self.storage.kv[:, 0].nbytes / BLOCK_SIZE
        return DecodeTiming(
            context, batch, median_ms, periods[int(len(periods) * 0.99)] * 1e3, graph_ms,
            statistics.median(launches) * 1e3, 1 - graph_ms / median_ms,
            (self._read_parameters * 2 + cache) / BYTES_PER_S * 1e3,
        )  # fmt: skip

    def _plans(self, front: Front, batch: int, num_steps: int) -> Iterator[StepPlan]:
        for _ in range(num_steps):
            self._step_id += 1
            yield StepPlan(self._step_id, [front.segment(row) for row in range(batch)])

    def _graph_ms(self, batch: int, num_replays: int) -> float:
        """The last step again and again."""
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
        """Chunks as a worker cuts them: up to `chunk` tokens in a step, of one prompt after the other."""
        times = []
        for _ in range(repeat + 1):
            front = Front(self.runner, self._num_blocks)
            for row in range(num_prompts):
                front.add(row, 0)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            under_way: deque[DeviceStep] = deque()
            for plan in self._prefill_plans(front, num_prompts, num_tokens, chunk):
                under_way.append(self.runner.launch(plan))
                if len(under_way) > STEPS_UNDER_WAY:
                    under_way.popleft().result()
            while under_way:
                assert not any(token.error for token in under_way.popleft().result().sampled)
            times.append(time.perf_counter() - begun)
            for row in range(num_prompts):
                front.remove(row)
        floor = num_prompts * (
            2 * self._layer_parameters * num_tokens
            + 2 * self.config.num_layers * self.config.num_heads * self.config.head_dim * num_tokens**2
        )
        ms = statistics.median(times[1:]) * 1e3
        return PrefillTiming(num_prompts, num_tokens, chunk, ms, floor / FLOP_PER_S * 1e3)

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
        front = Front(self.runner, self._num_blocks)
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


def print_decode(timing: DecodeTiming) -> None:
    target, vllm = DECODE_MS[timing.context, timing.batch]
    print(
        f"| {timing.context} | {timing.batch} | {timing.median_ms:.2f} | {timing.p99_ms:.2f} | {timing.graph_ms:.2f} "
        f"| {timing.idle:.1%} | {timing.launch_ms:.2f} | {target} | {vllm} | {timing.floor_ms:.2f} "
        f"| {timing.floor_ms / timing.median_ms:.0%} |",
        flush=True,
    )


def print_prefill(timing: PrefillTiming) -> None:
    target, vllm = PREFILL_MS[timing.num_tokens] if timing.num_prompts == 1 else ("–", "–")
    rate = timing.num_prompts * timing.num_tokens / timing.ms * 1e3
    print(
        f"| {timing.num_prompts} × {timing.num_tokens} | {timing.chunk} | {timing.ms:.1f} | {rate:,.0f} "
        f"| {target} | {vllm} | {timing.floor_ms:.1f} | {timing.floor_ms / timing.ms:.0%} |",
        flush=True,
    )


def check(device: torch.device) -> dict[str, float]:
    print(f"small float32 model: {same_tokens(device)} tokens as plain torch chooses them", flush=True)
    errors = logit_errors(device)
    print("bf16 logits against float32:", ", ".join(f"{k} {v:.2e}" for k, v in errors.items()), flush=True)
    assert errors["engine"] < 1.5 * errors["plain torch"] + 1e-3
    torch.cuda.empty_cache()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--blocks", type=int, default=8700, help="KV blocks of 8 MiB; what needs more is left out (8700)"
    )
    parser.add_argument("--steps", type=int, default=120, help="decode steps of each case")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--profile", type=int, nargs="*", default=[1, 64], help="batch sizes to profile")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    results: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "errors": {} if arguments.skip_check else check(device),
    }
    sizes = tuple(sorted({batch for _, batch in DECODE_CASES}))
    bench = Bench(read_shape("llama-3.1-8b"), num_blocks=arguments.blocks, max_rows=256, sizes=sizes)
    print("| context | batch | step ms | p99 | graph alone | idle | launch | target | vLLM | floor | share |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    decode = []
    for context, batch in DECODE_CASES:
        if batch * (context // BLOCK_SIZE + 2) > arguments.blocks:
            continue
        decode.append(bench.decode(context, batch, arguments.steps))
        print_decode(decode[-1])
    results["decode"] = [asdict(timing) for timing in decode]
    if not arguments.skip_prefill:
        print("| prompts | chunk | ms | tokens/s | target | vLLM | floor | share |\n|---|---|---|---|---|---|---|---|")
        cases = [(1, 512, 2048), (1, 2048, 2048), (1, 8192, 2048), (1, 8192, 8192), (1, 32768, 2048)]
        prefill = []
        for case in (*cases, (1, 32768, 8192), (32, 2048, 2048), (32, 2048, 8192)):
            prefill.append(bench.prefill(*case))
            print_prefill(prefill[-1])
        results["prefill"] = [asdict(timing) for timing in prefill]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))
    for batch in arguments.profile:
        print(f"kernels of a step, context 1024, batch {batch}:")
        for name, calls, us in bench.top_kernels(1024, batch, 14):
            print(f"  {us:8.1f} us {calls:5d} × {us / max(calls, 1):7.2f}  {name[:90]}", flush=True)


if __name__ == "__main__":
    main()
