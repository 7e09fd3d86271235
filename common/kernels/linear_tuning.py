"""How products with few rows are cut up and launched: what was measured, and a guess for other shapes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

_MIN_ROWS: Final = 16  # of a tensor core's operand


class Kind(IntEnum):
    """What a program computes."""

    PLAIN = 0  # columns
    GATED = 1  # columns of gate and the matching ones of up
    ROTATED = 2  # columns of the lower half of a head and the matching ones of the upper half


class Launch(IntEnum):
    """How a product is launched relative to its neighbours in the stream."""

    PLAIN = 0
    AT_END = 1  # dependent; lets the next kernel start when its programs have read their weights


@dataclass(frozen=True, slots=True)
class LinearTuning:
    """Choices that change speed alone (and, by the order of sums, the last bits)."""

    block_n: int  # outputs of a program; of each of the two parts, if it computes both
    block_k: int  # inputs of a step
    split: int  # parts that the inputs are cut into, one program each
    num_stages: int
    num_warps: int = 4
    swap: bool = True  # weights as the left operand: what wgmma reads from shared memory; needs block_n >= 64 for that
    use_tma: bool = True  # bulk tensor copies
    launch: Launch = Launch.PLAIN
    prefetch_bytes: int = 0  # of each weight row of a program, before waiting; only with a dependent launch


def _swapped(block_k: int, split: int, num_stages: int, *, use_tma: bool = True) -> LinearTuning:
    return LinearTuning(64, block_k, split, num_stages, use_tma=use_tma, launch=Launch.AT_END, prefetch_bytes=512)


def _narrow(block_k: int, num_stages: int) -> LinearTuning:
    return LinearTuning(32, block_k, 1, num_stages, swap=False, launch=Launch.AT_END, prefetch_bytes=512)


# By (inputs, outputs, kind, padded rows). What is here is launched dependently and took the least time in whole layers
# of a decode step on an H200 (`benchmarks.tune_layer`, docs/performance.md), but for plain products of qkv, whose
# tunings were found one by one; other products stay with cuBLAS, among them all with more than 64 rows. Neither
# fetching more of a weight ahead than 512 bytes of each row, nor fetching the next product's weights, nor letting the
# next kernel start before a product ends gained anything.
TUNED: Final[dict[tuple[int, int, Kind, int], LinearTuning]] = {
    (4096, 6144, Kind.PLAIN, 16): _swapped(64, 4, 7),
    (4096, 6144, Kind.PLAIN, 32): _swapped(128, 2, 4, use_tma=False),
    (4096, 6144, Kind.PLAIN, 64): _narrow(128, 4),
    (4096, 6144, Kind.ROTATED, 16): _swapped(128, 4, 3),
    (4096, 6144, Kind.ROTATED, 32): _swapped(128, 2, 5),
    (4096, 6144, Kind.ROTATED, 64): _narrow(128, 7),
    (4096, 4096, Kind.PLAIN, 16): _swapped(128, 4, 5),
    (4096, 4096, Kind.PLAIN, 32): _swapped(128, 2, 9, use_tma=False),
    (4096, 4096, Kind.PLAIN, 64): _narrow(256, 4),
    (4096, 28672, Kind.GATED, 16): _swapped(128, 1, 3),
    (4096, 28672, Kind.GATED, 32): _swapped(128, 1, 2),
    (4096, 28672, Kind.GATED, 64): _swapped(64, 1, 4),
    (14336, 4096, Kind.PLAIN, 16): _swapped(128, 4, 5),
    (14336, 4096, Kind.PLAIN, 32): _swapped(128, 4, 4),
    (14336, 4096, Kind.PLAIN, 64): _swapped(128, 2, 7, use_tma=False),
    # A rank of two of an 8B model, measured on an H200 with 1, 32 and 64 rows. Alone, products of o and, with 64 rows,
    # of qkv take up to 1.2 µs more than cuBLAS's.
    (4096, 3072, Kind.PLAIN, 16): _swapped(128, 4, 5),
    (4096, 3072, Kind.PLAIN, 32): _swapped(128, 2, 9),
    (4096, 3072, Kind.PLAIN, 64): _narrow(256, 4),
    (2048, 4096, Kind.PLAIN, 16): _swapped(128, 2, 11, use_tma=False),
    (2048, 4096, Kind.PLAIN, 32): _swapped(128, 2, 9, use_tma=False),
    (2048, 4096, Kind.PLAIN, 64): _narrow(256, 4),
    (4096, 14336, Kind.GATED, 16): _swapped(128, 1, 6),
    (4096, 14336, Kind.GATED, 32): _swapped(128, 1, 5),
    (4096, 14336, Kind.GATED, 64): _swapped(128, 1, 4),
    (7168, 4096, Kind.PLAIN, 16): _swapped(128, 4, 5),
    (7168, 4096, Kind.PLAIN, 32): _swapped(128, 2, 9, use_tma=False),
    (7168, 4096, Kind.PLAIN, 64): _swapped(128, 2, 7, use_tma=False),
    # A rank of two of a 70B model, likewise.
    (8192, 5120, Kind.PLAIN, 16): _swapped(128, 3, 5, use_tma=False),
    (8192, 5120, Kind.PLAIN, 32): _swapped(128, 3, 4, use_tma=False),
    (8192, 5120, Kind.PLAIN, 64): _swapped(128, 3, 3, use_tma=False),
    (4096, 8192, Kind.PLAIN, 16): _swapped(128, 1, 11, use_tma=False),
    (4096, 8192, Kind.PLAIN, 32): _swapped(128, 1, 9, use_tma=False),
    (4096, 8192, Kind.PLAIN, 64): _swapped(128, 1, 7),
    (8192, 28672, Kind.GATED, 16): _swapped(128, 1, 3),
    (8192, 28672, Kind.GATED, 32): _swapped(128, 1, 2),
    (8192, 28672, Kind.GATED, 64): _swapped(64, 1, 4),
    (14336, 8192, Kind.PLAIN, 16): _swapped(128, 1, 11, use_tma=False),
    (14336, 8192, Kind.PLAIN, 32): _swapped(128, 1, 9, use_tma=False),
    (14336, 8192, Kind.PLAIN, 64): _swapped(128, 1, 7, use_tma=False),
}


def padded_rows(num_rows: int) -> int:
    return max(_MIN_ROWS, 1 << (num_rows - 1).bit_length())


def default_tuning(num_in: int, num_out: int, kind: Kind, num_rows: int) -> LinearTuning:
    """What measured best, or for another shape a guess: 256 programs or so, half of an H100's shared memory each."""
    tuned = TUNED.get((num_in, num_out, kind, padded_rows(num_rows)))
    if tuned is not None:
        return tuned
    block_n, halves = (64, 1) if kind == Kind.PLAIN else (32, 2)
    tiles = -(-num_out // (block_n * halves))
    split = 1
    while split < 8 and tiles * split * 2 <= 264 and num_in // (split * 2) >= 512:
        split *= 2
    return LinearTuning(block_n=block_n, block_k=64, split=split, num_stages=6)
