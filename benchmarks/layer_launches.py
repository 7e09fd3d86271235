"""The products of a rank's layer compiled for Hopper in processes that need no GPU, as the layer launches them."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.compile_for_hopper import compile_for_hopper
from benchmarks.layer_tunings import DTYPE, Layer
from benchmarks.random_model import BLOCK_SIZE
from common.kernels import triton_linear
from common.kernels.dependent_launch import by_policy
from common.kernels.linear_tuning import TUNED, Kind, LinearTuning
from common.kernels.scaled_rows import NormedRows, ScaledRows

COMPILERS: Final = 12
MAX_SHARED_BYTES: Final = 227 << 10  # what a program can have
EPS: Final = 1e-5


@dataclass(frozen=True, slots=True)
class ProductLaunch:
    """One kernel: a product as some layer begins and ends it."""

    layer: Layer
    product: str
    rows: int  # padded
    tuning: LinearTuning
    parts: int = 0  # of the squares of `ScaledRows`; 0: the rows are finished
    adds: bool = False  # the residual, and begins the next norm: of a plain product

    def __call__(self) -> None:
        """Over empty tensors."""
        num_in, num_out, kind = self.layer.products[self.product]
        values = torch.empty(self.rows, num_in, dtype=DTYPE)
        x: NormedRows = values
        if self.parts:
            x = ScaledRows(values, torch.empty(self.parts, self.rows), EPS)
        weight = torch.empty(num_out, num_in, dtype=DTYPE).t()
        if kind == Kind.GATED:
            triton_linear.gate_up_silu_few(x, weight, self.tuning)
        elif kind == Kind.ROTATED:
            kv = torch.empty(2, 2, self.layer.num_kv_heads, BLOCK_SIZE, self.layer.head_dim, dtype=DTYPE)
            angles = torch.empty(self.rows, 1, self.layer.head_dim, dtype=DTYPE)
            slots, cleaned = (torch.zeros(self.rows, dtype=dtype) for dtype in (torch.int64, torch.int32))
            triton_linear.qkv_rope_store_few(
                x, weight, self.layer.num_heads, angles, angles, kv, slots, cleaned, self.tuning
            )
        elif self.adds:
            residual, norm = torch.empty(self.rows, num_out, dtype=DTYPE), torch.empty(num_out, dtype=DTYPE)
            triton_linear.linear_add_scale_few(values, weight, residual, norm, EPS, self.tuning)
        else:
            triton_linear.linear_few(values, weight, self.tuning)


def launches_of(
    layer: Layer, product: str, rows: int, tuning: LinearTuning, before: Iterable[LinearTuning]
) -> Iterator[ProductLaunch]:
    """A tuning in every way that a layer may launch it. `before`: tunings that the product ahead may have.

    Whatever the layer: with finished rows and with squares of 64 columns each, added and stored, as all of `TUNED` must
    compile without spilling (tests/kernels/test_triton_compile).
    """
    if layer.products[product][2] == Kind.PLAIN:
        yield ProductLaunch(layer, product, rows, tuning)
        yield ProductLaunch(layer, product, rows, tuning, adds=True)
        return
    widths = {64, *(other.block_n for other in before if layer.ranks == 1)}
    for parts in (0, *sorted(-(-layer.hidden // width) for width in widths)):
        yield ProductLaunch(layer, product, rows, tuning, parts=parts)


def served_launches(layer: Layer, rows: int) -> Iterator[ProductLaunch]:
    """What a layer launches, tuned as it is and launched as the policy in force says. rows: padded."""
    tunings = {product: TUNED[key] for product in layer.products if (key := layer.key(product, rows)) in TUNED}
    for product, ahead in (("qkv", "down"), ("gate_up", "o")):
        begins_scaled = layer.ranks == 1 and ahead in tunings
        scaled = -(-layer.hidden // tunings[ahead].block_n) if begins_scaled else 0
        if product in tunings:
            # The first layer begins with a norm of its own.
            for parts in {0, scaled} if product == "qkv" else {scaled}:
                yield ProductLaunch(layer, product, rows, by_policy(tunings[product]), parts=parts)
        if ahead in tunings:
            # The last layer adds what its last product stored.
            for adds in {layer.ranks == 1, False} if ahead == "down" else {layer.ranks == 1}:
                yield ProductLaunch(layer, ahead, rows, by_policy(tunings[ahead]), adds=adds)


_compiled: list[Any] = []


def prepare_process() -> None:
    """Make this process compile for Hopper instead of launching."""
    torch.set_num_threads(1)
    compile_for_hopper(_compiled.append)


def compile_launch(launch: ProductLaunch) -> str | None:
    """In a process that `prepare_process` has prepared. Returns what is wrong with it."""
    _compiled.clear()
    try:
        launch()
    except Exception as error:  # a tuning that does not compile is left out, whatever the reason
        return f"{type(error).__name__}: {error}"[:300]
    (kernel,) = _compiled
    if kernel.metadata.shared > MAX_SHARED_BYTES:
        return f"needs {kernel.metadata.shared} bytes of shared memory"
    spilled = stack_bytes(kernel.asm["cubin"])
    return f"spills {spilled} bytes" if spilled else None


def stack_bytes(cubin: bytes) -> int:
    """Where the assembler spills to."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", report))


def compile_in_processes(calls: Sequence[Callable[[], str | None]], deadline: float) -> list[str | None]:
    """Fill the cache on disk in parallel. By call: what it said was wrong. deadline: of `time.monotonic`."""
    pool = ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn"), initializer=prepare_process)
    futures = [pool.submit(call) for call in calls]
    wait(futures, timeout=max(0.1, deadline - time.monotonic()))
    outcomes = [_outcome(future) for future in futures]
    pool.shutdown(wait=False, cancel_futures=True)
    return outcomes


def _outcome(future: Future[str | None]) -> str | None:
    if not future.done():
        return "not in time"
    error = future.exception()  # a process that died takes the others with it
    return future.result() if error is None else repr(error)
