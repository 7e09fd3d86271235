"""Every Triton kernel compiles for Hopper without a GPU, in the shapes of an 8B model, and spills no register.

Run as a program it compiles and prints a JSON list; the test does that in a process of its own, as kernels that were
imported for the interpreter cannot be compiled.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final
from unittest import mock

import pytest
import torch

from benchmarks.compile_for_hopper import compile_for_hopper
from tests.kernels.attention_launches import attention_launches, decode_launches

ROOT: Final = Path(__file__).parents[2]
MAX_SHARED_BYTES: Final = 227 << 10  # what a thread block can have on Hopper
TIMEOUT_S: Final = 115
LAUNCHED_DEPENDENTLY: Final = {
    "_all_reduce_kernel", "_decode_kernel", "_finish_kernel", "_qk_norm_rope_store_kernel", "_rms_norm_kernel",
    "_silu_mul_kernel", "linear_kernel",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """Resources of one kernel, as the driver will see them."""

    name: str
    stack_bytes: int  # where the assembler spills to
    shared_bytes: int
    uses_wgmma: bool
    uses_bulk_copy: bool
    triggers: bool  # lets the kernel behind it start early
    waits: bool  # for the kernel ahead of it
    writes_before_waiting: bool  # to what other programs see
    last_loop: list[str]  # types of the values that its last `for` hands on from turn to turn


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
def test_kernels_spill_nothing_and_fit(compiled: list[Compiled]) -> None:
    assert len(compiled) >= 15
    assert [kernel for kernel in compiled if kernel.stack_bytes] == []
    assert max(kernel.shared_bytes for kernel in compiled) <= MAX_SHARED_BYTES


@pytest.mark.slow
def test_attention_uses_the_units_it_was_written_for(compiled: list[Compiled]) -> None:
    hopper = [kernel for kernel in compiled if kernel.name == "_hopper_kernel"]
    assert hopper
    assert all(kernel.uses_wgmma and kernel.uses_bulk_copy for kernel in hopper)
    assert any(kernel.uses_bulk_copy for kernel in compiled if kernel.name == "_decode_kernel")


@pytest.mark.slow
def test_products_with_few_rows_use_the_units_they_were_written_for(compiled: list[Compiled]) -> None:
    products = [kernel for kernel in compiled if kernel.name == "linear_kernel"]
    assert len(products) >= 50
    # All with weights as the left operand and bulk copies; for the others something else was measured best.
    assert sum(kernel.uses_wgmma and kernel.uses_bulk_copy for kernel in products) >= 34


@pytest.mark.slow
def test_kernels_of_a_decode_layer_start_early_and_write_late(compiled: list[Compiled]) -> None:
    dependent = [kernel for kernel in compiled if kernel.triggers or kernel.waits]
    assert {kernel.name for kernel in dependent} == LAUNCHED_DEPENDENTLY
    assert all(kernel.triggers and kernel.waits for kernel in dependent), "one without the other hides a missing wait"
    assert [kernel for kernel in dependent if kernel.writes_before_waiting] == []
    # Launched plainly, as for prompts, they know nothing of it.
    assert {kernel.name for kernel in compiled if kernel not in dependent} >= LAUNCHED_DEPENDENTLY


@pytest.mark.slow
def test_a_draw_from_many_chunks_remembers_the_sum_before_the_chosen_one(compiled: list[Compiled]) -> None:
    """Where it begins, the sum before it, and the running sum: the compiler once took the second for a constant."""
    draws = [kernel for kernel in compiled if kernel.name == "_draw_kernel"]
    assert draws
    assert all(sorted(kernel.last_loop) == ["f64", "f64", "i32"] for kernel in draws)


def compile_all() -> Iterator[Compiled]:
    """Launch everything with launches replaced by compilation for compute capability 9.0."""
    from benchmarks.layer_launches import stack_bytes

    kernels = {}
    compile_for_hopper(lambda kernel: kernels.update({kernel.hash: kernel}))
    for launch in launches():
        launch()
    for kernel in kernels.values():
        ptx = kernel.asm["ptx"]
        before_waiting = ptx.partition("griddepcontrol.wait")[0]
        yield Compiled(
            name=kernel.name,
            stack_bytes=stack_bytes(kernel.asm["cubin"]),
            shared_bytes=kernel.metadata.shared,
            uses_wgmma="wgmma.mma_async" in ptx,
            uses_bulk_copy="cp.async.bulk.tensor" in ptx,
            triggers="griddepcontrol.launch_dependents" in ptx,
            waits="griddepcontrol.wait" in ptx,
            writes_before_waiting=re.search(r"\b(st|atom|red)\.(?!shared)", before_waiting) is not None,
            last_loop=last_loop(kernel.asm["ttgir"]),
        )


def last_loop(ttgir: str) -> list[str]:
    found = re.findall(r"scf\.for .* -> \((.*?)\) ", ttgir)
    return found[-1].split(", ") if found else []


def launches() -> Iterator[Callable[[], object]]:
    for head_dim in (128, 64):
        yield from attention_launches(head_dim, torch.bfloat16)
    yield from row_launches(torch.bfloat16)
    yield from all_reduce_launches(torch.bfloat16)
    yield from dependent_launches(torch.bfloat16)
    yield from decode_launches(torch.bfloat16)
    yield from block_launches(torch.bfloat16)
    yield from step_launches()
    yield from draw_launches()
    yield from product_launches(torch.bfloat16)


def dependent_launches(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """What attention and rows launch for few rows on Hopper: as if the processor were one."""
    from common.kernels import dependent_launch

    def on_hopper(launch: Callable[[], object]) -> None:
        with mock.patch.object(dependent_launch, "is_hopper", return_value=True):
            launch()

    for launch in (*attention_launches(128, dtype), *row_launches(dtype), *all_reduce_launches(dtype)):
        yield partial(on_hopper, launch)


def row_launches(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    from benchmarks import library_rows
    from common.kernels import triton_rows
    from common.kernels.scaled_rows import ScaledRows

    x, residual = (torch.empty(2, 4096, dtype=dtype) for _ in range(2))
    weight = torch.empty(4096, dtype=dtype)
    gate_up = torch.empty(2, 2 * 14336, dtype=dtype)
    yield lambda: triton_rows.rms_norm(x, weight, 1e-5)
    yield lambda: triton_rows.add_rms_norm(x, residual, weight, 1e-5)
    yield lambda: triton_rows.silu_mul(gate_up)
    begun = ScaledRows(x, torch.empty(128, 16), 1e-5)
    yield lambda: triton_rows.finished(begun)
    cleaned = torch.zeros(2, dtype=torch.int32)
    yield lambda: triton_rows.spoil_cleaned(x, cleaned)
    yield lambda: library_rows.layer_norm(x, weight, weight, 1e-5)
    yield lambda: library_rows.softmax(x)


def all_reduce_launches(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    from common.parallel import triton_all_reduce

    peers = triton_all_reduce.PeerMemory.of(0, [0, 0], torch.device("cpu"))
    x, residual = (torch.empty(2, 4096, dtype=dtype) for _ in range(2))
    yield lambda: triton_all_reduce.all_reduce_add_rms_norm(x, residual, x[0], 1e-5, peers)


def block_launches(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    from common.kernels import blocks_reference, triton_blocks

    kv = torch.empty(2, 4, 2, 8, 64, 128, dtype=dtype)
    ids = torch.tensor([1, 3])
    payload = torch.empty(2, 2, 2, 4, 64, 128, dtype=dtype)
    yield lambda: triton_blocks.gather_with_digest(kv, ids, 2, 4, payload)
    yield lambda: triton_blocks.scatter_with_digest(kv, ids, 2, 4, payload)
    yield lambda: triton_blocks.digest_on_device(payload)
    sizes = (10, blocks_reference.SCRATCH_WORDS, blocks_reference.REPORT_WORDS)
    words, scratch, report = (torch.zeros(n, dtype=torch.int64) for n in sizes)
    slot = torch.zeros(blocks_reference.HEADER_WORDS * 8 + payload.nbytes, dtype=torch.uint8)
    yield lambda: triton_blocks.gather_slot(kv, words, 2, 2, 4, slot, scratch)
    yield lambda: triton_blocks.scatter_slot(kv, words, 2, 2, 4, slot, scratch, report)


def step_launches() -> Iterator[Callable[[], object]]:
    from common.kernels import triton_step
    from common.kernels.triton_sampling import NUM_STATE_FIELDS

    packed, chunks = (torch.zeros(fields, 8, dtype=torch.int32) for fields in (5, 4))
    state = torch.zeros(9, NUM_STATE_FIELDS, dtype=torch.int32)
    row_tables, tables = (torch.zeros(rows, 2056, dtype=torch.int32) for rows in (9, 8))
    lengths, new_ids = (torch.zeros(size, dtype=torch.int32) for size in (8, 512))
    token_ids, positions, slots = (torch.zeros(512, dtype=torch.int64) for _ in range(3))
    yield lambda: triton_step.begin_step(packed, state, row_tables, 64, token_ids, positions, lengths, tables)
    yield lambda: triton_step.begin_chunks(chunks, new_ids, row_tables, 64, token_ids, positions, slots, tables)
    hidden = torch.zeros(512, 4096, dtype=torch.bfloat16)
    yield lambda: triton_step.judge_chunks(hidden, chunks[2], chunks[1], lengths)


def draw_launches() -> Iterator[Callable[[], object]]:
    from common.kernels.triton_sampling import NUM_STATE_FIELDS, draw_tokens

    vocab_size = 128256
    rows, indices, token_ids = (torch.zeros(2, dtype=torch.int32) for _ in range(3))
    state = torch.zeros(3, NUM_STATE_FIELDS, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        yield partial(draw_tokens, torch.zeros(2, vocab_size, dtype=dtype), vocab_size, rows, indices, state, token_ids)


def product_launches(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """What layers launch, tuned as they are, and those of `TUNED` that begin a layer with norms of Q and K."""
    from benchmarks.layer_launches import served_launches
    from benchmarks.layer_tunings import RANK_SHAPES
    from common.kernels import linear_tuning, triton_linear

    for shape in RANK_SHAPES.values():
        for rows in (16, 32, 64):
            yield from served_launches(shape.layer(), rows)
    for (num_in, num_out, kind, rows), tuning in linear_tuning.TUNED.items():
        if kind == linear_tuning.Kind.PLAIN:
            x, weight = torch.empty(rows, num_in, dtype=dtype), torch.empty(num_out, num_in, dtype=dtype).t()
            yield partial(triton_linear.linear_few, x, weight, tuning)
    untuned = linear_tuning.LinearTuning(64, 64, split=2, num_stages=6)  # launched plainly
    down, norm = torch.empty(4096, 14336, dtype=dtype).t(), torch.empty(4096, dtype=dtype)
    for rows in (1, 32, 64):
        gated, residual = (torch.empty(rows, size, dtype=dtype) for size in down.shape)
        yield partial(triton_linear.linear_add_scale_few, gated, down, residual, norm, 1e-5, untuned)


if __name__ == "__main__":
    print(json.dumps([asdict(kernel) for kernel in compile_all()]))  # noqa: T201
