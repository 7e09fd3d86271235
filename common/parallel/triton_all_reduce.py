"""An all-reduce in one kernel over memory that the ranks map from each other, alone or with the norm that follows it.

    peer memory of a rank: | regions [MAX_PROGRAMS][2][REGION_BYTES] | flags int32 [MAX_PROGRAMS][MAX_RANKS] |

Program p writes its part to its region, tells program p of every other rank how often it has done so (its *epoch*),
waits until all have told it the same, and sums the regions in rank order: the same bits everywhere. Regions alternate:
a rank that writes one again has heard of the epoch in between, which its readers announced after they had finished.
Epochs live on the device, so that a captured graph may be replayed. Their differences are compared, so they may wrap.

With the norm it is launched dependently (`common.kernels.dependent_launch`). Programs wait for each other, but the
kernel behind cannot take their place: it starts when all of them are here.
"""

# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from common.kernels.dependent_launch import is_dependent, launch_options, start_next, wait_for_previous

MAX_PROGRAMS: Final = 512  # few enough to run at once, as they wait for each other
MAX_RANKS: Final = 8
REGION_BYTES: Final = 32 << 10
_FLAGS_OFFSET: Final = MAX_PROGRAMS * 2 * REGION_BYTES
PEER_BYTES: Final = _FLAGS_OFFSET + MAX_PROGRAMS * MAX_RANKS * 4
_MIN_CHUNK_BYTES: Final = 4 << 10
MAX_BYTES: Final = MAX_PROGRAMS * REGION_BYTES


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """What the kernel needs to find the others."""

    rank: int
    size: int
    addresses: torch.Tensor  # [size] int64, on the device: every rank's peer memory, zeroed before the first use
    epochs: torch.Tensor  # [MAX_PROGRAMS] int32, on the device

    @classmethod
    def of(cls, rank: int, addresses: list[int], device: torch.device) -> PeerMemory:
        assert len(addresses) <= MAX_RANKS
        return cls(
            rank,
            len(addresses),
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        )


def fits(x: torch.Tensor) -> bool:
    """Whether rows of [T, n] fit into the regions of one launch."""
    return x.dim() == 2 and 0 < x.shape[0] <= MAX_PROGRAMS and x.shape[1] * x.itemsize <= REGION_BYTES


def all_reduce(x: torch.Tensor, peers: PeerMemory) -> None:
    """Sum over the ranks, in place. x: contiguous, at most MAX_BYTES."""
    chunk_bytes = max(_MIN_CHUNK_BYTES, triton.next_power_of_2(triton.cdiv(x.nbytes, MAX_PROGRAMS)))
    chunk = chunk_bytes // x.itemsize
    num_programs = triton.cdiv(x.numel(), chunk)
    assert x.is_contiguous(), "rows would be sent that are not there"
    assert num_programs <= MAX_PROGRAMS, "there are no regions for so many programs"
    _all_reduce_kernel[(num_programs,)](
        x, x, x, x, peers.addresses, peers.epochs, x.numel(), chunk, 0.0,
        RANK=peers.rank, SIZE=peers.size, WITH_NORM=False, COLUMNS=chunk, MAX_RANKS=MAX_RANKS,
        REGION_BYTES=REGION_BYTES, FLAGS_OFFSET=_FLAGS_OFFSET, DEPENDENT=False,
        num_warps=8 if chunk_bytes < 16 << 10 else 16,
    )  # fmt: skip


def all_reduce_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, peers: PeerMemory
) -> torch.Tensor:
    """Sum `x` over the ranks, add it to `residual` in place, return the norm of the sum.

    x, residual: [T, n], contiguous; weight: [n]. On two ranks, bit for bit an all-reduce followed by `add_rms_norm`.
    """
    assert fits(x), "the caller asks first"
    assert x.is_contiguous(), "rows would be sent that are not there"
    assert residual.is_contiguous(), "rows would be written that are not there"
    out = torch.empty_like(x)
    num_rows, num_columns = x.shape
    columns = triton.next_power_of_2(num_columns)
    dependent = is_dependent(num_rows, x.device)
    _all_reduce_kernel[(num_rows,)](
        x, residual, weight, out, peers.addresses, peers.epochs, num_columns, num_columns, eps,
        RANK=peers.rank, SIZE=peers.size, WITH_NORM=True, COLUMNS=columns, MAX_RANKS=MAX_RANKS,
        REGION_BYTES=REGION_BYTES, FLAGS_OFFSET=_FLAGS_OFFSET, DEPENDENT=dependent,
        num_warps=min(16, max(4, columns // 256)), **launch_options(dependent),
    )  # fmt: skip
    return out


@triton.jit
def _all_reduce_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, addresses_ptr, epochs_ptr, limit, stride, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, WITH_NORM: tl.constexpr, COLUMNS: tl.constexpr, MAX_RANKS: tl.constexpr,
    REGION_BYTES: tl.constexpr, FLAGS_OFFSET: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,) with a norm, `limit` columns each; else (chunks of COLUMNS,) of `limit` elements."""
    if DEPENDENT:
        start_next()
        wait_for_previous()  # before others are told anything
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    columns = tl.arange(0, COLUMNS)
    offsets = program.to(tl.int64) * stride + columns
    mask = columns < limit if WITH_NORM else offsets < limit
    region = (program * 2 + (epoch & 1)).to(tl.int64) * REGION_BYTES
    tl.store(_part(addresses_ptr, RANK, region, x_ptr) + columns, tl.load(x_ptr + offsets, mask, other=0.0), mask)
    tl.debug_barrier()  # all of the part is written before anybody is told
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = _flag(addresses_ptr, peer, program * MAX_RANKS + RANK, FLAGS_OFFSET)
            tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = _flag(addresses_ptr, RANK, program * MAX_RANKS + peer, FLAGS_OFFSET)
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            while seen - epoch < 0:
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        part = tl.load(_part(addresses_ptr, peer, region, x_ptr) + columns, mask, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float32)
    total = total.to(x_ptr.dtype.element_ty)
    if WITH_NORM:
        # As in `add_rms_norm`: the norm must be that of the rounded sum, which the next layer reads.
        total = (total.to(tl.float32) + tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)).to(
            residual_ptr.dtype.element_ty
        )
        tl.store(residual_ptr + offsets, total, mask)
        total = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total) / limit + eps)
        total = total * scale * tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask)
    tl.store(epochs_ptr + program, epoch)


@triton.jit
def _part(addresses_ptr, peer, region, like_ptr):
    """A peer's region, as a pointer to elements like those of `like_ptr`."""
    address = tl.load(addresses_ptr + peer) + region
    return tl.multiple_of(address.to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)


@triton.jit
def _flag(addresses_ptr, peer, index, FLAGS_OFFSET: tl.constexpr):
    """One of a peer's flags."""
    return (tl.load(addresses_ptr + peer) + FLAGS_OFFSET).to(tl.pointer_type(tl.int32)) + index
