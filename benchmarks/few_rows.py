"""Matrix products with few rows: our Triton kernels beside cuBLAS, each checked against float64 before it is timed.

    python -m benchmarks.few_rows [--shape-set 8b-tp2] [--rows 1 8 16 32 64] [--seconds 150] [--out FILE.json]

Weights rotate through more memory than any cache holds. Prints the best tuning of every product and the lines to
paste into `TUNED` of `common.kernels.linear_tuning`. For one rank's shapes it then times a whole model's chain of
products (`benchmarks.few_rows_chain`). Whatever fails is printed and left out; what does not fit the time is too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from benchmarks.few_rows_chain import Best, attention_and_prefetch, chains
from benchmarks.few_rows_configs import (
    DTYPE,
    ONE_RANK,
    SHAPE_SETS,
    Config,
    compile_config,
    configs,
    endings_of,
    prepare_process,
    run_product,
    shapes_of,
)
from benchmarks.kernel_timing import READ_BYTES_PER_S, Call, median_us, relative_error
from common.kernels.linear_tuning import Launch, LinearTuning, padded_rows
from common.kernels.triton_rows import silu_mul

ROTATED_BYTES: Final = 800_000_000
MAX_ERROR: Final = 1e-2  # what rounding to bfloat16 explains
CHAIN_SHARE: Final = 0.3  # of the time, kept for the chains
COMPILERS: Final = 12


@dataclass(frozen=True, slots=True)
class Timed:
    """One tuning of one product."""

    product: str
    ending: str
    num_rows: int
    us: float
    error: float
    tuning: dict[str, object]


def compile_all(wanted: list[Config], deadline: float) -> set[Config]:
    """Fill the cache on disk in parallel. Returns what did not compile in time."""
    bad = set(wanted)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, context, initializer=prepare_process) as pool:
        futures = {config: pool.submit(compile_config, config) for config in wanted}
        for config, future in futures.items():
            try:
                failure = future.result(timeout=max(0.1, deadline - time.monotonic()))
            except Exception as error:  # a process that died takes the others with it: they compile when launched
                failure = repr(error)
                future.cancel()
            if failure is None:
                bad.discard(config)
            else:
                print(f"not compiled: {config}: {failure}", flush=True)
    return bad


def expected(ending: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """In float64."""
    product = x.double() @ weight.double()
    if ending == "add":
        return residual.double() + product
    if ending == "silu":
        gate, up = product.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up
    return product


def library_calls(product: str, ending: str, x: torch.Tensor, weights: list[torch.Tensor]) -> list[Call]:
    """cuBLAS with the weight in its best order, then our separate kernel for SiLU * up."""

    def gate_up(weight: torch.Tensor) -> torch.Tensor:
        return silu_mul(torch.mm(x, weight))

    if product != "gate_up":
        weights = [weight.contiguous() for weight in weights]
    return [partial(gate_up, weight) if ending == "silu" else partial(torch.mm, x, weight) for weight in weights]


def check_and_time(
    config: Config, x: torch.Tensor, weights: list[torch.Tensor], residual: torch.Tensor, wide: torch.Tensor
) -> Timed:
    """wide: what the first weight gives in float64. Raises ArithmeticError for a wrong or varying result."""
    outs = [run_product(config.ending, x, weights[0], residual.clone(), config.tuning) for _ in range(3)]
    error = max(relative_error(out, wide) for out in outs)
    if error > MAX_ERROR or not all(torch.equal(out, outs[0]) for out in outs):
        raise ArithmeticError(f"error {error:.1e}, or results that vary")
    changed = residual.clone()
    calls: list[Call] = [
        partial(run_product, config.ending, x, weight, changed, config.tuning) for weight in weights * 2
    ]
    us = median_us(calls)
    return Timed(config.product, config.ending, x.shape[0], us, error, asdict(config.tuning))


def tuned_line(shape_set: str, product: str, num_rows: int, tuning: LinearTuning, us: float, library_us: float) -> str:
    """An entry of `TUNED`, commented out where cuBLAS took no more time."""
    shape = shapes_of(shape_set)[product]
    is_gated = product == "gate_up"
    key = shape.num_in, shape.num_out // 2 if is_gated else shape.num_out, is_gated, padded_rows(num_rows)
    text = (
        f"LinearTuning({tuning.block_n}, {tuning.block_k}, {tuning.split}, {tuning.num_stages}, {tuning.num_warps}, "
        f"swap={tuning.swap}, use_tma={tuning.use_tma}, launch=Launch.{tuning.launch.name}, "
        f"prefetch_bytes={tuning.prefetch_bytes})"
    )
    return f"    {'' if us < library_us else '# '}{key}: {text},  # {us:.1f} us, cuBLAS {library_us:.1f}"


def tune(
    shape_set: str,
    product: str,
    ending: str,
    all_rows: list[int],
    prefetch_bytes: int,
    is_late: Callable[[], bool],
    tuned: dict[tuple[str, int], str],
) -> Iterator[tuple[Timed, Config]]:
    """Prints a line per number of rows, and adds to `tuned` the entry of (product, padded rows) for the most rows."""
    shape = shapes_of(shape_set)[product]
    count = max(2, ROTATED_BYTES // (shape.num_in * shape.num_out * DTYPE.itemsize))
    size = (shape.num_out, shape.num_in)
    weights = [(torch.randn(size, dtype=DTYPE, device="cuda") * shape.num_in**-0.5).t() for _ in range(count)]
    floor_us = weights[0].nbytes / READ_BYTES_PER_S * 1e6
    for num_rows in all_rows:
        x = torch.randn(num_rows, shape.num_in, dtype=DTYPE, device="cuda")
        residual = torch.randn(num_rows, shape.num_out, dtype=DTYPE, device="cuda")
        library_us = median_us(library_calls(product, ending, x, weights) * 2)
        wide = expected(ending, x, weights[0], residual)
        found: dict[Launch, list[tuple[float, Timed, Config]]] = {launch: [] for launch in Launch}
        for config in configs(product, ending, num_rows, prefetch_bytes, shape_set):
            if is_late():
                print("out of time: tunings left out", flush=True)
                return
            try:
                timed = check_and_time(config, x, weights, residual, wide)
            except Exception as error:  # a tuning that cannot run, or runs wrongly, is left out
                print(f"failed: {config}: {type(error).__name__}: {error}"[:300], flush=True)
                continue
            found[config.tuning.launch].append((timed.us, timed, config))
            yield timed, config
        if found[Launch.AT_END]:  # the way that all of `TUNED` are launched
            us, _, config = min(found[Launch.AT_END], key=lambda result: result[0])
            line = tuned_line(shape_set, product, num_rows, config.tuning, us, library_us)
            tuned[product, padded_rows(num_rows)] = line
        cells = []
        for launch, results in found.items():
            if results:
                us, _, config = min(results, key=lambda result: result[0])
                t = config.tuning
                how = f"{t.block_n}x{t.block_k} split {t.split} stages {t.num_stages}"
                how += f"{' swap' if t.swap else ''}{' tma' if t.use_tma else ''}"
                cells.append(f"{launch.name} {us:.1f} ({how})")
        print(
            f"| {product} | {ending} | {num_rows} | {floor_us:.1f} | {library_us:.1f} | {' | '.join(cells)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape-set", choices=SHAPE_SETS, default=ONE_RANK, help=f"whose products ({ONE_RANK})")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=150, help="for everything, compiling included")
    parser.add_argument(
        "--prefetch-bytes", type=int, default=512, help="of each weight row; a power of two from 256 on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape_set, all_rows = arguments.shape_set, sorted(arguments.rows)
    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    end = started + arguments.seconds
    tuning_end = end - (CHAIN_SHARE * arguments.seconds if shape_set == ONE_RANK else 0)
    buckets = sorted({padded_rows(rows) for rows in arguments.rows})
    wanted = [
        config
        for product, endings in endings_of(shape_set).items()
        for ending in endings
        for rows in buckets
        for config in configs(product, ending, rows, arguments.prefetch_bytes, shape_set)
    ]
    bad = compile_all(wanted, started + 0.4 * arguments.seconds)
    print(f"{len(wanted) - len(bad)} of {len(wanted)} compiled in {time.monotonic() - started:.0f} s", flush=True)
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", flush=True)
    print("| product | ending | rows | floor µs | cuBLAS | best Triton, by launch |\n|---|---|---|---|---|---|")
    best: Best = {}
    tuned: dict[tuple[str, int], str] = {}
    table = []
    for is_first in (True, False):  # what a fused layer would use comes first
        for product, endings in endings_of(shape_set).items():
            for ending in endings[:1] if is_first else endings[1:]:
                late = partial(lambda limit: time.monotonic() > limit, tuning_end)
                rest = all_rows, arguments.prefetch_bytes, late, tuned
                for timed, config in tune(shape_set, product, ending, *rest):
                    table.append(asdict(timed))
                    key = product, ending, timed.num_rows, config.tuning.launch
                    if key not in best or timed.us < best[key][0]:
                        best[key] = timed.us, config.tuning
                torch.cuda.empty_cache()
    print("for TUNED in common/kernels/linear_tuning.py:", *tuned.values(), sep="\n", flush=True)
    chain_rows = []
    for measure in (attention_and_prefetch, chains) if shape_set == ONE_RANK else ():
        try:
            for line in measure(best, all_rows, lambda: time.monotonic() > end):
                print(line, flush=True)
                chain_rows.append(line)
        except Exception as error:  # the figures before it are worth having
            print(f"failed: {measure.__name__}: {type(error).__name__}: {error}"[:500], flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps(
                {"shape_set": shape_set, "tuned": list(tuned.values()), "tunings": table, "chains": chain_rows},
                indent=1,
            )
        )
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
