"""How the fused products of a decode step with few rows are cut up best: timed in whole layers, not one by one.

    python -m benchmarks.tune_layer --shape 8b [--rows 16 32 64] [--context 1024] [--seconds 540] [--out FILE]

Captures the layers of one rank once per tuning of a product (`benchmarks.layer_tunings`), all else fixed, checks each
graph, and times them by turns; goes from product to product, keeping the best. Of a rank of two the sums are its own:
nothing is exchanged. Prints the five best of each product, the time of a layer before and after, and lines to paste
into `TUNED` of `common.kernels.linear_tuning`. What spills registers, fails or is wrong is printed and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.decode_layer import CONTEXT, MAX_ERROR, ROUNDS, Step, replay_ms
from benchmarks.kernel_timing import relative_error
from benchmarks.layer_launches import ProductLaunch, compile_in_processes, compile_launch, launches_of
from benchmarks.layer_tunings import RANK_SHAPES, Key, Layer, candidates, tuned_line
from benchmarks.random_model import BLOCK_SIZE, random_decoder, random_storage, read_shape
from common.kernels.dependent_launch import LaunchPolicy
from common.kernels.linear_tuning import TUNED, LinearTuning
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup

ORDER: Final = ("qkv", "o", "down", "gate_up", "qkv")  # what comes first is tuned again beside the others' best
AHEAD: Final = {"qkv": "down", "gate_up": "o"}  # what makes the rows that these begin with
# By padded rows: batches that are timed; the first is tuned for.
BATCHES: Final = {16: (1, 8), 32: (32,), 64: (64,)}
# The first layer begins with a norm of its own, the second with half of one. Two in bfloat16 are 5e-3 from float64, and
# `MAX_ERROR` is allowed; whole tiles or rows that are wrong are further off.
CHECKED_LAYERS: Final = 2
# Of all layers, from those of the first tuning. Sums in another order are other bfloat16 numbers now and then, which
# grows from layer to layer: to 1.7e-2 in 32 random layers of 512 columns, in plain torch on a CPU.
MAX_DRIFT: Final = 5e-2
COMPILE_SHARE: Final = 0.45  # of the time
SHOWN: Final = 5

Choices = dict[tuple[str, int], list[LinearTuning]]  # by product and padded rows
Tunings = dict[Key, LinearTuning]


class OwnSums:
    """`Collectives` of a rank whose peers are not there: it adds nothing to what it has."""

    def all_reduce(self, tensor: torch.Tensor, /) -> None:
        pass

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor, /) -> None:
        gathered.copy_(tensor.expand_as(gathered))

    def close(self) -> None:
        pass


def lone_rank(ranks: int) -> TensorParallelGroup:
    """Rank 0, alone."""
    return TensorParallelGroup(0, ranks, OwnSums()) if ranks > 1 else TensorParallelGroup.single()


@contextmanager
def tuned(entries: Tunings) -> Iterator[None]:
    """With these in `TUNED` meanwhile. Taken at launch: a captured graph keeps its own."""
    before = dict(TUNED)
    TUNED.update(entries)
    try:
        yield
    finally:
        TUNED.clear()
        TUNED.update(before)


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph and what its replays touch."""

    graph: torch.cuda.CUDAGraph
    out: torch.Tensor  # [batch, hidden]
    step: Step

    @classmethod
    def of(cls, step: Step) -> Captured:
        graph, out = step.capture(LaunchPolicy())
        return cls(graph, out, step)

    def outputs(self) -> list[torch.Tensor]:
        """For both inputs, the same whenever it is the same input. Raises ArithmeticError if they are not."""
        found = self.step.outputs(self.graph, self.out)
        if not all(torch.equal(first, second) for first, second in zip(found[:2], found[2:], strict=True)):
            raise ArithmeticError("results vary from replay to replay")
        return found[:2]


class Bench:
    """The rank's layers over one batch, and its first layers, which are few enough for float64."""

    def __init__(self, decoder: Decoder, first: Decoder, batch: int, context: int) -> None:
        num_blocks = batch * context // BLOCK_SIZE
        self.batch = batch
        self.num_layers = decoder.config.num_layers
        self._step = Step(decoder, random_storage(decoder, num_blocks), batch, context)
        self._first_step = Step(first, random_storage(first, num_blocks), batch, context)
        self._wide = self._first_step.wide(self._first_step.inputs[0])
        self._expected: list[torch.Tensor] = []

    def capture(self, entries: Tunings) -> Captured:
        """Raises ArithmeticError if the layers, so tuned, are wrong; they are compared with the first captured."""
        with tuned(entries):
            error = relative_error(Captured.of(self._first_step).outputs()[0], self._wide)
            if error > MAX_ERROR:
                raise ArithmeticError(f"{CHECKED_LAYERS} layers are {error:.1e} from float64")
            captured = Captured.of(self._step)
            found = captured.outputs()
        self._expected = self._expected or found
        drift = max(relative_error(own, other) for own, other in zip(found, self._expected, strict=True))
        if drift > MAX_DRIFT:
            raise ArithmeticError(f"{self.num_layers} layers are {drift:.1e} from the first tuning's")
        return captured

    def layer_us(self, graphs: Sequence[Captured]) -> list[float]:
        """By graph: microseconds of a layer, medians of rounds in which they take turns."""
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(ROUNDS):
            for own, captured in zip(times, graphs, strict=True):
                own.append(replay_ms(captured.graph) * 1e3 / self.num_layers)
        return [statistics.median(rounds) for rounds in times]

    def before_and_after(self, best: Tunings) -> tuple[float, float]:
        """Microseconds of a layer as `TUNED` is, and with the best in it. Raises as `capture` does."""
        before_us, after_us = self.layer_us([self.capture({}), self.capture(best)])
        return before_us, after_us


def first_layers(decoder: Decoder, count: int) -> Decoder:
    """A model of the same weights that ends early."""
    config = dataclasses.replace(decoder.config, num_layers=count, windows=decoder.config.windows[:count])
    weights = dataclasses.replace(decoder._weights, layers=decoder._weights.layers[:count])
    return Decoder(config, decoder.shard, weights, decoder.kernels, decoder._group)


def compiled_choices(layer: Layer, all_rows: Sequence[int], deadline: float) -> Choices:
    """What compiles in time for every way of launching it, and spills nothing."""
    launches: list[tuple[LinearTuning, ProductLaunch]] = []
    choices: Choices = {(product, rows): candidates(layer, product, rows) for rows in all_rows for product in ORDER}
    for (product, rows), found in choices.items():
        before = choices[AHEAD[product], rows] if product in AHEAD else ()
        launches += [
            (tuning, launch) for tuning in found for launch in launches_of(layer, product, rows, tuning, before)
        ]
    failures = compile_in_processes([partial(compile_launch, launch) for _, launch in launches], deadline)
    for (tuning, launch), failure in zip(launches, failures, strict=True):
        if failure is not None and tuning in choices[launch.product, launch.rows]:
            choices[launch.product, launch.rows].remove(tuning)
            print(f"left out: {launch.product}, {launch.rows} rows, {shown(tuning)}: {failure}", flush=True)
    return choices


def shown(tuning: LinearTuning) -> str:
    way = f"{' swap' if tuning.swap else ''}{' tma' if tuning.use_tma else ''}"
    tile = f"{tuning.block_n}x{tuning.block_k}"
    return f"{tile} split {tuning.split} stages {tuning.num_stages} warps {tuning.num_warps}{way}"


def tune_product(
    bench: Bench, key: Key, choices: list[LinearTuning], best: Tunings
) -> list[tuple[float, LinearTuning]]:
    """Microseconds of a layer by tuning of one product, the best first. The present one is among them."""
    present = [best[key]] if key in best else []
    graphs: dict[LinearTuning, Captured] = {}
    for tuning in (*present, *(choice for choice in choices if choice not in present)):
        try:
            graphs[tuning] = bench.capture({**best, key: tuning})
        except Exception as error:  # what cannot run, or runs wrongly, is left out
            print(f"failed: {key}, {shown(tuning)}: {type(error).__name__}: {error}"[:300], flush=True)
    times = bench.layer_us(list(graphs.values()))
    return sorted(zip(times, graphs, strict=True), key=lambda result: result[0])


def tune_rows(bench: Bench, layer: Layer, rows: int, choices: Choices, is_late: Callable[[], bool]) -> Tunings:
    """The best of every product that could be measured, one after the other. Prints a line of the table for each."""
    best: Tunings = {}
    measured: set[Key] = set()
    for product in layer.products:
        key = layer.key(product, rows)
        found = [TUNED[key]] if key in TUNED else choices[product, rows]
        if found:
            best[key] = found[0]
    for product in ORDER:
        if is_late():
            print(f"out of time: {product} with {rows} rows left out", flush=True)
            continue
        key = layer.key(product, rows)
        results = tune_product(bench, key, choices[product, rows], best)
        torch.cuda.empty_cache()
        if results:
            best[key] = results[0][1]
            measured.add(key)
        cells = [f"{us:.1f} ({shown(tuning)})" for us, tuning in results[:SHOWN]]
        print(f"| {rows} | {product} | {' | '.join(cells)} |", flush=True)
    return {key: tuning for key, tuning in best.items() if key in measured}


def run(arguments: argparse.Namespace, started: float) -> dict[str, Any]:
    """Tune all rows. Prints, and returns what `--out` holds, which is written after each number of rows."""
    shape, end = RANK_SHAPES[arguments.shape], started + arguments.seconds
    layer, all_rows = shape.layer(), sorted(set(arguments.rows))
    choices = compiled_choices(layer, all_rows, started + COMPILE_SHARE * arguments.seconds)
    num_left = sum(map(len, choices.values()))
    print(f"{num_left} tunings compiled in {time.monotonic() - started:.0f} s", flush=True)
    device = torch.device("cuda")
    torch.manual_seed(0)
    config = read_shape(shape.model, arguments.layers or shape.num_layers)
    decoder = random_decoder(config, device, group=lone_rank(shape.ranks))
    first = first_layers(decoder, min(CHECKED_LAYERS, config.num_layers))
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, {config.num_layers} layers", flush=True)
    table: dict[str, Any] = {"shape": arguments.shape, "context": arguments.context, "layers": config.num_layers}
    table |= {"device": torch.cuda.get_device_name(), "us": {}, "tuned": []}
    print(f"| rows | product | µs of a layer by tuning, the {SHOWN} best |\n|---|---|---|")
    for rows in all_rows:
        bench = Bench(decoder, first, BATCHES[rows][0], arguments.context)
        best = tune_rows(bench, layer, rows, choices, lambda: time.monotonic() > end)
        for batch in BATCHES[rows]:
            other = bench if batch == bench.batch else Bench(decoder, first, batch, arguments.context)
            try:
                us = other.before_and_after(best)
            except Exception as error:  # the tunings found are worth having
                print(f"failed: batch {batch}: {type(error).__name__}: {error}"[:300], flush=True)
                continue
            table["us"][batch] = us
            print(f"batch {batch}: {us[0]:.1f} µs a layer before, {us[1]:.1f} after", flush=True)
        del other
        table["tuned"] += [tuned_line(key, tuning) for key, tuning in best.items()]
        del bench
        torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.write_text(json.dumps(table, indent=1))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=list(RANK_SHAPES), required=True, help="a model and how many share it")
    parser.add_argument("--rows", type=int, nargs="+", choices=list(BATCHES), default=list(BATCHES), help="padded")
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"tokens, a multiple of {BLOCK_SIZE}")
    parser.add_argument("--layers", type=int, help="how many are captured; by default what fits")
    parser.add_argument("--seconds", type=float, default=540, help="for everything, compiling included")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.context % BLOCK_SIZE:
        parser.error(f"--context must be a multiple of {BLOCK_SIZE}")
    started = time.monotonic()
    table = run(arguments, started)
    print("for TUNED in common/kernels/linear_tuning.py:", *table["tuned"], sep="\n")
    print("| batch | µs of a layer before | after |\n|---|---|---|")
    for batch, (before_us, after_us) in table["us"].items():
        print(f"| {batch} | {before_us:.1f} | {after_us:.1f} |")
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
