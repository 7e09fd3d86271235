"""Products one after the other, as in a decode step: whether dependent launches pay, and whether a side stream that
fetches the next weights into the cache while attention waits for memory does.
"""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
import triton
import triton.language as tl

from benchmarks.few_rows_configs import DTYPE, SHAPES, run_product
from benchmarks.kernel_timing import READ_BYTES_PER_S, median_us, relative_error
from common.kernels import triton_backend
from common.kernels.batch import KVShape, Span
from common.kernels.linear_tuning import Launch, LinearTuning
from common.kernels.triton_rows import silu_mul

NUM_LAYERS: Final = 32
ATTENTION_LAYERS: Final = 16
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, CONTEXT = 32, 8, 128, 64, 1024
PIECE_BYTES: Final = 2048
PIECES_PER_PROGRAM: Final = 128

# By (product, ending, rows, launch): microseconds and the tuning that took them.
Best = dict[tuple[str, str, int, Launch], tuple[float, LinearTuning]]
_Layer = dict[str, torch.Tensor]


@triton.jit
def _fetch_kernel(
    weight_ptr, num_pieces, PIECE_ELEMENTS: tl.constexpr, PIECE_BYTES: tl.constexpr, PIECES: tl.constexpr
):
    """Ask for a weight to be in the second-level cache. Grid: (pieces / PIECES,)."""
    piece = tl.minimum(tl.program_id(0) * PIECES + tl.arange(0, PIECES), num_pieces - 1).to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r", [(weight_ptr + piece * PIECE_ELEMENTS).to(tl.int64), PIECE_BYTES],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def fetch(weight: torch.Tensor) -> None:
    num_pieces = weight.nbytes // PIECE_BYTES
    _fetch_kernel[(triton.cdiv(num_pieces, PIECES_PER_PROGRAM),)](
        weight, num_pieces, PIECE_ELEMENTS=PIECE_BYTES // weight.element_size(), PIECE_BYTES=PIECE_BYTES,
        PIECES=PIECES_PER_PROGRAM, num_warps=4,
    )  # fmt: skip


def random_layer() -> _Layer:
    """By product: [in, out], lying [out, in]."""
    return {
        name: (torch.randn(shape.num_out, shape.num_in, dtype=DTYPE, device="cuda") * shape.num_in**-0.5).t()
        for name, shape in SHAPES.items()
    }


def library_order(layer: _Layer) -> _Layer:
    return {name: weight if name == "gate_up" else weight.contiguous() for name, weight in layer.items()}


def library_chain(layers: Sequence[_Layer], x: torch.Tensor) -> torch.Tensor:
    """x: [T, hidden]. Attention is left out: `o` takes Q."""
    for layer in layers:
        q = torch.mm(x, layer["qkv"])[:, : SHAPES["o"].num_in]
        x = torch.mm(silu_mul(torch.mm(torch.mm(q, layer["o"]), layer["gate_up"])), layer["down"])
    return x


def own_chain(layers: Sequence[_Layer], tunings: dict[str, LinearTuning], x: torch.Tensor) -> torch.Tensor:
    """As `library_chain`."""
    for layer in layers:
        for name, ending in (("qkv", "plain"), ("o", "plain"), ("gate_up", "silu"), ("down", "plain")):
            x = run_product(ending, x[:, : SHAPES[name].num_in], layer[name], x, tunings[name])
    return x


def chains(best: Best, all_rows: Sequence[int], is_late: Callable[[], bool]) -> Iterator[str]:
    """A line per number of rows: microseconds of all layers."""
    layers = [random_layer() for _ in range(NUM_LAYERS)]
    library_layers = [library_order(layer) for layer in layers]
    floor_us = sum(weight.nbytes for layer in layers for weight in layer.values()) / READ_BYTES_PER_S * 1e6
    yield f"chain of {NUM_LAYERS} layers, floor {floor_us:.0f} us"
    for num_rows in all_rows:
        x = torch.randn(num_rows, SHAPES["qkv"].num_in, dtype=DTYPE, device="cuda")
        library_us = median_us([partial(library_chain, library_layers, x)])
        cells = [f"cuBLAS + SiLU {library_us:.0f}"]
        for launch in Launch:
            if is_late():
                yield "out of time: chains left out"
                return
            tunings = {
                name: best[name, ending, num_rows, launch][1]
                for name, ending in (("qkv", "plain"), ("o", "add"), ("gate_up", "silu"), ("down", "add"))
                if (name, ending, num_rows, launch) in best
            }
            if len(tunings) < len(SHAPES):
                cells.append(f"{launch.name} without tunings")
                continue
            # One layer: over many, rounding errors grow in both chains.
            error = relative_error(own_chain(layers[:1], tunings, x), library_chain(library_layers[:1], x))
            us = median_us([partial(own_chain, layers, tunings, x)])
            cells.append(f"{launch.name} {us:.0f} (a layer differs by {error:.0e})")
        yield f"rows {num_rows}: " + ", ".join(cells)


def attention_and_prefetch(best: Best, all_rows: Sequence[int], is_late: Callable[[], bool]) -> Iterator[str]:
    """A line per number of rows: microseconds of attention and `o`, with and without fetching o's weight beside it."""
    shape = SHAPES["o"]
    for num_rows in all_rows:
        if is_late():
            yield "out of time: attention left out"
            return
        count = CONTEXT // BLOCK_SIZE
        spans = [Span(1, CONTEXT, list(range(row * count, (row + 1) * count))) for row in range(num_rows)]
        kv_shape = KVShape(num_rows * count, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        plan = triton_backend.plan_batch(spans, [None], kv_shape, DTYPE, torch.device("cuda"))
        size = (kv_shape.num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        q = torch.randn(num_rows, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        layers = [
            (torch.randn(size, dtype=DTYPE, device="cuda"), torch.randn(*reversed(shape), dtype=DTYPE, device="cuda"))
            for _ in range(ATTENTION_LAYERS)
        ]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        tuning = best.get(("o", "add", num_rows, Launch.PLAIN), (0.0, None))[1]

        def attend(
            kv: torch.Tensor,
            weight: torch.Tensor,
            with_fetch: bool,
            with_own: bool,
            q: torch.Tensor = q,
            plan: triton_backend.TritonPlan = plan,
            side: torch.cuda.Stream = side,
            tuning: LinearTuning | None = tuning,
        ) -> None:
            main = torch.cuda.current_stream()
            if with_fetch:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    fetch(weight)
            attended = triton_backend.attention(q, kv, plan, None, HEAD_DIM**-0.5)
            if with_fetch:
                main.wait_stream(side)
            if with_own:
                run_product("plain", attended, weight.t(), attended, tuning)
            else:
                torch.mm(attended, weight.t())

        cells = []
        for with_own in (False, True):
            times = [
                median_us([partial(attend, kv, weight, with_fetch, with_own) for kv, weight in layers])
                for with_fetch in (False, True)
            ]
            cells.append(f"{'Triton' if with_own else 'cuBLAS'} {times[0]:.1f}, fetched beside {times[1]:.1f}")
        yield f"attention 1k and o, rows {num_rows}: " + "; ".join(cells)
