"""Steps with a chunk of a prompt, beside decoding rows or alone, on one GPU: as graphs against kernel by kernel.

    python -m benchmarks.mixed_steps

Checked first: on a small float32 model both ways choose the same tokens in plans that grow and shrink; on the large one
one step of each case stores the same K and V up to rounding, and changes nothing else in any block. Then steps run as
in a worker, two under way at a time: rows with contexts of 1k, and prompts that are computed from token 512 to 1536.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch

from benchmarks.random_model import BLOCK_SIZE, GREEDY, Front, random_decoder, random_storage, read_shape
from common.models.config import ModelConfig
from common.quiet_collector import quiet_collector
from common.sampling.params import SamplingParams
from common.worker.device_runner import DeviceRunner
from common.worker.device_step import DeviceStep
from common.worker.step_plan import Segment, StepPlan

CONTEXT: Final = 1024
STEPS_UNDER_WAY: Final = 2
FIRST_STEPS: Final = 8  # of a case, not counted
MAX_ERROR: Final = 0.05  # of K and V in bf16, relative: sums in another order, through all layers
SMALL_BLOCKS: Final = 128
DRAWN: Final = SamplingParams(max_tokens=1 << 20, seed=1 << 63 | 5, temperature=0.8, top_k=40, top_p=0.9)


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds."""

    step_ms: float  # from the result of a step to that of the next, median
    slowest_ms: float
    device_ms: float  # from the first of a step's kernels to the end of the last, median
    launch_ms: float  # of the host, median


@dataclass(frozen=True, slots=True)
class Case:
    """Both ways, and how far they agree."""

    rows: int
    chunk: int
    error: float  # of K and V
    same_tokens: float  # share
    captured: Timing
    eager: Timing

    def markdown(self) -> str:
        cells = [str(self.rows), str(self.chunk)]
        for timing in (self.captured, self.eager):
            cells += [f"{ms:.2f}" for ms in (timing.step_ms, timing.slowest_ms, timing.device_ms, timing.launch_ms)]
        return f"| {' | '.join((*cells, f'{self.error:.1e}', f'{self.same_tokens:.0%}'))} |"


class Bench:
    """A model with its blocks, and both runners on them."""

    def __init__(
        self, config: ModelConfig, max_rows: int, chunks: list[int], num_steps: int, device: torch.device
    ) -> None:
        self._vocab_size = config.vocab_size
        self._num_steps = num_steps
        row_blocks = -(-(CONTEXT + num_steps + FIRST_STEPS) // BLOCK_SIZE)
        self._num_blocks = max_rows * row_blocks + 2 * CONTEXT // BLOCK_SIZE
        decoder = random_decoder(config, device)
        self._storage = random_storage(decoder, self._num_blocks)
        self._eager = DeviceRunner(decoder, self._storage, max_rows + 1, graph_sizes=())
        begun = time.perf_counter()
        self._captured = DeviceRunner(decoder, self._storage, max_rows + 1, graph_sizes=(), chunk_tokens=max(chunks))
        graphs = self._captured._mixed
        assert graphs is not None
        torch.cuda.synchronize()
        print(f"captured {len(graphs._steps)} graphs in {time.perf_counter() - begun:.1f} s", flush=True)

    def measure(self, rows: int, chunk: int) -> Case:
        error, same_tokens = self._compare(rows, chunk)
        captured, eager = (self._time(runner, rows, chunk) for runner in (self._captured, self._eager))
        return Case(rows, chunk, error, same_tokens, captured, eager)

    @torch.inference_mode()
    def _compare(self, rows: int, chunk: int) -> tuple[float, float]:
        """One step, both ways, on the same blocks: error of what it stored, share of equal tokens."""
        kv = self._storage.kv
        # Other values for each case: what a step stores could be there already.
        kv.normal_(generator=torch.Generator(kv.device).manual_seed(1000 * rows + chunk))
        before = kv.clone()
        expected = torch.empty_like(kv)
        tokens = []
        for runner in (self._eager, self._captured):
            kv.copy_(before)
            front = Front(runner, self._num_blocks)
            (plan,) = self._plans(front, rows, chunk, 1)
            result = runner.launch(plan).result()
            _remove_all(front, rows)
            tokens.append([token.token_id for token in result.sampled])
            if runner is self._eager:
                expected.copy_(kv)
        squares = [0.0, 0.0]
        for old, wanted, own in zip(before, expected, kv, strict=True):
            written = (wanted != old).any(dim=-1)
            assert int(written[:, 0, 0].sum()) == rows + chunk, "K was not stored for every token"
            assert torch.equal(own[~written], old[~written]), "a captured step wrote where it must not"
            values = wanted[written].double()
            squares[0] += float((own[written].double() - values).square().sum())
            squares[1] += float(values.square().sum())
        error = (squares[0] / squares[1]) ** 0.5
        assert error < MAX_ERROR, f"K and V are {error:.1e} from those of the step that was run kernel by kernel"
        equal = [own == other for own, other in zip(*tokens, strict=True)]
        return error, sum(equal) / len(equal)

    def _time(self, runner: DeviceRunner, rows: int, chunk: int) -> Timing:
        front = Front(runner, self._num_blocks)
        ends, launches, devices = [], [], []
        under_way: deque[DeviceStep] = deque()
        for plan in self._plans(front, rows, chunk, self._num_steps + FIRST_STEPS):
            begun = time.perf_counter()
            under_way.append(runner.launch(plan))
            launches.append(time.perf_counter() - begun)
            if len(under_way) == STEPS_UNDER_WAY:
                devices.append(under_way.popleft().result().compute_ns * 1e-9)
                ends.append(time.perf_counter())
        while under_way:
            under_way.popleft().result()
        _remove_all(front, rows)
        periods = [later - earlier for earlier, later in pairwise(ends[FIRST_STEPS:])]
        medians = [statistics.median(times) * 1e3 for times in (devices[FIRST_STEPS:], launches[FIRST_STEPS:])]
        return Timing(statistics.median(periods) * 1e3, max(periods) * 1e3, *medians)

    def _plans(self, front: Front, rows: int, chunk: int, num_steps: int) -> Iterator[StepPlan]:
        """Row `rows` computes one prompt after the other; the rows before it decode."""
        for row in range(rows):
            front.add(row, CONTEXT, last_token=row)
        rng = random.Random(rows)
        num_left = 0
        for step in range(num_steps):
            if num_left <= 0:
                if step:
                    front.remove(rows)
                front.add(rows, CONTEXT // 2)
                num_left = CONTEXT
            tokens = [rng.randrange(self._vocab_size) for _ in range(chunk)]
            num_left -= chunk
            chunk_segment = front.segment(rows, tokens, sample=num_left <= 0 or num_steps == 1)
            yield StepPlan(step, [*(front.segment(row) for row in range(rows)), chunk_segment])


def _remove_all(front: Front, rows: int) -> None:
    for row in range(rows + 1):
        front.remove(row)


def same_tokens(device: torch.device, config: ModelConfig, num_steps: int = 40) -> int:
    """How many tokens both ways chose alike. Raises if they did not."""
    runs = []
    for chunk_tokens in (0, 128):
        decoder = random_decoder(config, device, torch.float32, seed=3)
        torch.manual_seed(5)
        storage = random_storage(decoder, SMALL_BLOCKS)
        runner = DeviceRunner(decoder, storage, 8, graph_sizes=(1, 2, 4, 8), chunk_tokens=chunk_tokens)
        runs.append(_tokens(runner, config.vocab_size, num_steps))
    if runs[0] != runs[1]:
        raise AssertionError(f"tokens differ: {runs[0]} and {runs[1]}")
    return sum(map(len, runs[0]))


def _tokens(runner: DeviceRunner, vocab_size: int, num_steps: int) -> list[list[int]]:
    """Sequences join and leave; beside those that decode, up to 128 tokens of prompts in each step."""
    front, rng = Front(runner, SMALL_BLOCKS), random.Random(9)
    prompts: dict[int, int] = {}  # tokens left
    chosen = []
    for step in range(num_steps):
        free = [row for row in range(8) if row not in prompts]
        if free and rng.random() < 0.6:
            front.add(free[0], 0, None, rng.choice([GREEDY, DRAWN]))
            prompts[free[0]] = rng.choice([1, 40, 200, 300])
        segments: list[Segment] = []
        budget = rng.choice([64, 100, 128])
        for row in rng.sample(sorted(prompts), len(prompts)):
            if prompts[row] == 0:
                segments.append(front.segment(row))
            elif budget:
                count = min(budget, prompts[row])
                prompts[row] -= count
                budget -= count
                tokens = [rng.randrange(vocab_size) for _ in range(count)]
                segments.append(front.segment(row, tokens, sample=prompts[row] == 0))
        if segments:
            result = runner.launch(StepPlan(step, segments)).result()
            assert not any(token.error for token in result.sampled), result
            chosen.append([token.token_id for token in result.sampled])
        for row in [row for row, left in prompts.items() if left == 0 and rng.random() < 0.1]:
            front.remove(row)
            del prompts[row]
    return chosen


def small_config() -> ModelConfig:
    """Three layers in which float32 is as good as exact."""
    return dataclasses.replace(
        read_shape("qwen3-8b", 3), hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2, vocab_size=2000
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 16, 32, 64], help="that decode")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens, up to 1024")
    parser.add_argument("--steps", type=int, default=48, help="of each case, each way (48)")
    parser.add_argument("--shape", default="llama-3.1-8b", help="of the random weights (llama-3.1-8b)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), flush=True)
    count = same_tokens(device, small_config())
    print(f"small float32 model: {count} tokens as they are chosen kernel by kernel", flush=True)
    bench = Bench(read_shape(args.shape), max(args.rows), args.chunks, args.steps, device)
    quiet_collector()  # as a rank does
    ways = " | ".join(f"{way}: step ms | slowest | device | launch" for way in ("captured", "kernel by kernel"))
    print(f"| rows | chunk | {ways} | error of K and V | same tokens |\n|{'---|' * 12}", flush=True)
    cases = []
    for rows in args.rows:
        for chunk in args.chunks:
            cases.append(bench.measure(rows, chunk))
            print(cases[-1].markdown(), flush=True)
    if args.out:
        args.out.write_text(json.dumps([asdict(case) for case in cases], indent=1))


if __name__ == "__main__":
    main()
