"""Matrix products of a decode step: few rows against a weight that is read once, so speed is that of memory.

Weights lie [out, in] in memory: a tile is then rows of consecutive bytes. A product may end with what would be a kernel
of its own (`triton_linear_kernel.Ending`). The norm before a product is divided between two: the one that makes the
rows multiplies them by the norm's weight and sums their squares, the one that reads them divides its results by their
root mean square (`ScaledRows`). The inputs of a product may be cut into parts; the last program to arrive sums the
parts of a tile in their order, so results never vary.

Launched dependently (`dependent_launch`), a product starts while the kernel before it still runs, and fetches its first
weights into the second-level cache before it waits for that kernel: weights depend on nothing.
"""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from common.errors import InternalError
from common.kernels.dependent_launch import by_policy, launch_options
from common.kernels.linear_tuning import TUNED, Kind, Launch, LinearTuning, default_tuning, padded_rows
from common.kernels.scaled_rows import NormedRows, ScaledRows, values_of
from common.kernels.triton_device import current_stream, is_hopper
from common.kernels.triton_linear_kernel import Ending, linear_kernel

MAX_ROWS: Final = 128
PIECE_BYTES: Final = 256  # of a weight row, fetched by one instruction
_MIN_ARRIVALS: Final = 4096
_KEPT_ROW_ELEMENTS: Final = 1 << 18  # of parts, at least: 1 MiB


@dataclass(frozen=True, slots=True)
class _Workspace:
    """What programs leave for each other; one per device and stream, as launches on a stream follow each other."""

    parts: torch.Tensor  # float32
    arrivals: torch.Tensor  # int32, zero between launches


@dataclass(frozen=True, slots=True)
class _Rotation:
    """What a product that makes Q, K and V needs besides."""

    cos: torch.Tensor
    sin: torch.Tensor
    kv_layer: torch.Tensor
    store_slots: torch.Tensor
    cleaned: torch.Tensor


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """x: [T, in]; weight: [in, out]. Whether these functions take them: few rows, a weight that lies [out, in]."""
    num_in = weight.shape[0]
    return (
        0 < x.shape[0] <= MAX_ROWS
        and x.stride(1) == 1
        and weight.stride() == (1, num_in)
        and num_in * weight.element_size() % 16 == 0
        and x.dtype == weight.dtype
    )


def is_ahead(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> bool:
    """Whether the product is one of those that together beat cuBLAS (`TUNED`). x: [T, in]; weight: [in, out]."""
    key = *weight.shape, kind, padded_rows(x.shape[0])
    return key in TUNED and x.dtype == torch.bfloat16 and is_hopper(x.device) and supports(x, weight)


def _kind_of(ending: Ending) -> Kind:
    """By which tunings are kept."""
    return {Ending.SILU: Kind.GATED, Ending.ROTATE: Kind.ROTATED}.get(ending, Kind.PLAIN)


def linear_few(x: torch.Tensor, weight: torch.Tensor, tuning: LinearTuning | None = None) -> torch.Tensor:
    """x: [T, in], T <= 128; weight: [in, out] of strides (1, in). Returns [T, out]."""
    out = x.new_empty((x.shape[0], weight.shape[1]))
    _launch(x, weight, out, Ending.STORE, tuning)
    return out


def gate_up_silu_few(x: NormedRows, weight: torch.Tensor, tuning: LinearTuning | None = None) -> torch.Tensor:
    """weight: [in, 2n], gate first. Returns silu(gate) * up, [T, n]. Otherwise as `linear_few`."""
    values = values_of(x)
    out = values.new_empty((values.shape[0], weight.shape[1] // 2))
    _launch(x, weight, out, Ending.SILU, tuning)
    return out


def linear_add_scale_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    tuning: LinearTuning | None = None,
) -> ScaledRows:
    """Add x @ weight to `residual`, [T, out], in place and return the RMSNorm of the sum; norm: [out], its weight."""
    tuning = _tuning_of(x, weight, Ending.ADD, tuning)
    num_parts = triton.cdiv(weight.shape[1], tuning.block_n)
    squares = torch.empty((num_parts, padded_rows(x.shape[0])), dtype=torch.float32, device=x.device)
    made = ScaledRows(torch.empty_like(residual, memory_format=torch.contiguous_format), squares, eps)
    _launch(x, weight, residual, Ending.ADD, tuning, norm=norm, made=made)
    return made


def qkv_rope_store_few(
    x: NormedRows,
    weight: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_layer: torch.Tensor,
    store_slots: torch.Tensor,
    cleaned: torch.Tensor,
    tuning: LinearTuning | None = None,
) -> torch.Tensor:
    """Multiply, rotate Q and K, store K and V in their blocks, return Q, [T, num_heads, head_dim].

    weight: [in, (num_heads + 2 * num_kv_heads) * head_dim]; cos, sin: [T, 1, head_dim]; kv_layer: [num_blocks, 2,
    num_kv_heads, block_size, head_dim]; store_slots: [T] int64, block * block_size + offset, negative: not stored;
    cleaned: [T] int32, set to 1 for tokens of which something was not finite and zero was stored.
    """
    values = values_of(x)
    q = values.new_empty((values.shape[0], num_heads, kv_layer.shape[-1]))
    rotation = _Rotation(cos, sin, kv_layer, store_slots, cleaned)
    _launch(x, weight, q.view(values.shape[0], -1), Ending.ROTATE, tuning, rotation=rotation)
    return q


def _tuning_of(x: torch.Tensor, weight: torch.Tensor, ending: Ending, tuning: LinearTuning | None) -> LinearTuning:
    return tuning or by_policy(default_tuning(weight.shape[0], weight.shape[1], _kind_of(ending), x.shape[0]))


def _launch(
    x: NormedRows,
    weight: torch.Tensor,
    out: torch.Tensor,
    ending: Ending,
    tuning: LinearTuning | None,
    norm: torch.Tensor | None = None,
    made: ScaledRows | None = None,
    rotation: _Rotation | None = None,
) -> None:
    """out: [T, columns]. `norm` and `made`: with ADD; `rotation`: with ROTATE."""
    squares, eps = (None, 0.0) if isinstance(x, torch.Tensor) else (x.squares, x.eps)
    values = values_of(x)
    if not supports(values, weight):
        raise InternalError(f"no product for x {tuple(values.shape)} and strides {weight.stride()}, {values.dtype}")
    tuning = _tuning_of(values, weight, ending, tuning)
    num_rows, num_in = values.shape
    num_columns = weight.shape[1] // (2 if ending in (Ending.SILU, Ending.ROTATE) else 1)
    _, _, num_kv_heads, block_size, head_dim = rotation.kv_layer.shape if rotation else (0, 0, 1, 1, 2)
    if rotation and head_dim // 2 % tuning.block_n:
        raise InternalError(f"a tile of {tuning.block_n} columns is no part of half a head of {head_dim}")
    rows = padded_rows(num_rows)
    if squares is not None and (squares.shape[1] != rows or not squares.is_contiguous()):
        raise InternalError(f"squares {tuple(squares.shape)} are not those of {rows} rows, padding included")
    tiles = triton.cdiv(num_columns, tuning.block_n)
    # Every part has inputs: otherwise it would not be a part.
    part_in = triton.cdiv(triton.cdiv(num_in, tuning.split), tuning.block_k) * tuning.block_k
    split = triton.cdiv(num_in, part_in)
    tiles_of_program = weight.shape[1] // num_columns
    space = _workspace(values.device, tiles, tiles * split * rows * tuning.block_n * tiles_of_program)
    rows_in_memory = weight.t()
    box = [tuning.block_n, tuning.block_k]
    dependent = tuning.launch != Launch.PLAIN
    unused = values  # for pointers that this ending has no use for
    linear_kernel[(tiles * split,)](
        values, rows_in_memory,
        TensorDescriptor(rows_in_memory, [weight.shape[1], num_in], [num_in, 1], box) if tuning.use_tma else None,
        out, space.parts, space.arrivals,
        unused if squares is None else squares, unused if norm is None else norm,
        made.values if made else unused, made.squares if made else unused,
        rotation.cos if rotation else unused, rotation.sin if rotation else unused,
        rotation.store_slots if rotation else unused, rotation.kv_layer if rotation else unused,
        rotation.cleaned if rotation else unused,
        num_rows, values.stride(0), out.stride(0), rotation.cos.stride(0) if rotation else 0, eps,
        NUM_COLUMNS=num_columns, NUM_IN=num_in, PART_IN=part_in, ROWS=rows, BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k, SPLIT=split, ENDING=int(ending), SQUARES=0 if squares is None else squares.shape[0],
        SWAP=tuning.swap, USE_TMA=tuning.use_tma, DEPENDENT=dependent, PIECES=tuning.prefetch_bytes // PIECE_BYTES,
        PIECE_BYTES=PIECE_BYTES, STAGES=tuning.num_stages, NUM_HEADS=out.shape[1] // head_dim,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages, **launch_options(dependent),
    )  # fmt: skip


_WORKSPACES: dict[tuple[torch.device, int], _Workspace] = {}
_KEPT: list[_Workspace] = []  # captured graphs hold addresses, not references


def _workspace(device: torch.device, num_tiles: int, num_elements: int) -> _Workspace:
    """Grown when needed, kept otherwise: a captured graph keeps using the tensors it was captured with."""
    key = device, current_stream(device)
    space = _WORKSPACES.get(key)
    if space is None or space.parts.numel() < num_elements or space.arrivals.numel() < num_tiles:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InternalError("a product must run once before it is captured, to have a cleared workspace")
        space = _Workspace(
            parts=torch.empty(max(num_elements, _KEPT_ROW_ELEMENTS), dtype=torch.float32, device=device),
            arrivals=torch.zeros(max(num_tiles, _MIN_ARRIVALS), dtype=torch.int32, device=device),
        )
        _WORKSPACES[key] = space
        _KEPT.append(space)
    return space
