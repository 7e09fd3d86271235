"""Which tunings `benchmarks.few_rows` tries, and their compilation for Hopper in processes that need no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch

from benchmarks.compile_for_hopper import compile_for_hopper
from common.kernels import triton_linear
from common.kernels.linear_tuning import Launch, LinearTuning, padded_rows

SHARED_BYTES: Final = 225 << 10  # of a multiprocessor, less what the driver and barriers take
MAX_STAGES: Final = 12
MAX_GATED_OUTPUTS: Final = 64 * 128  # of a program, of gate and of up: twice as many do not fit into its registers
DTYPE: Final = torch.bfloat16


class Shape(NamedTuple):
    """A product: [T, num_in] @ [num_in, num_out]."""

    num_in: int
    num_out: int


SHAPES: Final = {
    "qkv": Shape(4096, 6144),
    "o": Shape(4096, 4096),
    "gate_up": Shape(4096, 2 * 14336),
    "down": Shape(14336, 4096),
}
# What a product ends with besides storing: the first is what a fused layer would use.
ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "qkv": ("plain",),
    "o": ("add", "plain"),
    "gate_up": ("silu", "plain"),
    "down": ("add", "plain"),
}
# Of a rank of two: the all-reduce adds the residual.
RANK_SHAPES: Final = {
    "8b-tp2": {
        "qkv": Shape(4096, 3072),
        "o": Shape(2048, 4096),
        "gate_up": Shape(4096, 2 * 7168),
        "down": Shape(7168, 4096),
    },
    "70b-tp2": {
        "qkv": Shape(8192, 5120),
        "o": Shape(4096, 8192),
        "gate_up": Shape(8192, 2 * 14336),
        "down": Shape(14336, 8192),
    },
}
RANK_ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "qkv": ("plain",),
    "o": ("plain",),
    "gate_up": ("silu",),
    "down": ("plain",),
}


class Choice(NamedTuple):
    """A tuning but for its stages, which fill the shared memory that `per_sm` programs have each."""

    block_n: int
    block_k: int
    split: int
    per_sm: int
    swap: bool = True
    use_tma: bool = True


# Programs must all fit on the device at once (132 multiprocessors), or a second wave costs as much as the first.
CHOICES: Final = {
    "qkv": (
        Choice(64, 128, 2, 2),
        Choice(64, 64, 4, 3),
        Choice(64, 128, 1, 1),
        Choice(32, 128, 1, 2, swap=False),
        Choice(128, 64, 4, 2),
        Choice(64, 128, 2, 2, use_tma=False),
    ),
    "o": (
        Choice(64, 128, 2, 1),
        Choice(64, 128, 4, 2),
        Choice(32, 128, 1, 1, swap=False),
        Choice(64, 64, 4, 2),
        Choice(32, 256, 1, 1, swap=False),
        Choice(128, 64, 8, 2),
    ),
    "gate_up": (
        Choice(64, 64, 1, 2),
        Choice(64, 128, 1, 2),
        Choice(128, 64, 1, 1),
        Choice(32, 64, 1, 4, swap=False),
        Choice(64, 64, 2, 4),
        Choice(64, 64, 1, 2, use_tma=False),
    ),
    "down": (
        Choice(64, 128, 2, 1),
        Choice(64, 128, 4, 2),
        Choice(32, 128, 1, 1, swap=False),
        Choice(128, 64, 4, 1),
        Choice(64, 64, 6, 3),
        Choice(64, 128, 2, 1, use_tma=False),
    ),
}
RANK_CHOICES: Final = {
    "8b-tp2": {
        "qkv": (
            Choice(64, 128, 2, 1),
            Choice(64, 128, 4, 2),
            Choice(64, 64, 4, 2),
            Choice(32, 128, 1, 1, swap=False),
            Choice(32, 256, 1, 1, swap=False),
        ),
        "o": (
            Choice(64, 128, 2, 1),
            Choice(64, 128, 4, 2),
            Choice(64, 128, 2, 1, use_tma=False),
            Choice(32, 128, 1, 1, swap=False),
            Choice(32, 256, 1, 1, swap=False),
        ),
        "gate_up": (
            Choice(64, 128, 1, 1),
            Choice(64, 64, 2, 2),
            Choice(64, 128, 2, 2),
            Choice(64, 64, 1, 1),
            Choice(32, 64, 1, 2, swap=False),
        ),
        "down": (
            Choice(64, 128, 2, 1),
            Choice(64, 128, 4, 2),
            Choice(64, 128, 2, 1, use_tma=False),
            Choice(32, 128, 1, 1, swap=False),
            Choice(64, 64, 6, 3),
        ),
    },
    "70b-tp2": {
        "qkv": (
            Choice(64, 128, 3, 2),
            Choice(64, 64, 3, 2),
            Choice(128, 64, 3, 1),
            Choice(32, 128, 1, 2, swap=False),
            Choice(64, 128, 3, 2, use_tma=False),
        ),
        "o": (
            Choice(64, 128, 1, 1),
            Choice(64, 128, 2, 2),
            Choice(32, 128, 1, 2, swap=False),
            Choice(64, 128, 1, 1, use_tma=False),
            Choice(128, 64, 2, 1),
        ),
        "gate_up": (
            Choice(64, 64, 1, 2),
            Choice(64, 128, 1, 2),
            Choice(128, 64, 1, 1),
            Choice(32, 64, 1, 4, swap=False),
            Choice(64, 64, 1, 2, use_tma=False),
        ),
        "down": (
            Choice(64, 128, 1, 1),
            Choice(64, 128, 2, 2),
            Choice(32, 128, 1, 2, swap=False),
            Choice(64, 128, 1, 1, use_tma=False),
            Choice(128, 64, 2, 1),
        ),
    },
}
ONE_RANK: Final = "8b"
SHAPE_SETS: Final = (ONE_RANK, *RANK_SHAPES)


def shapes_of(shape_set: str) -> dict[str, Shape]:
    return RANK_SHAPES.get(shape_set, SHAPES)


def endings_of(shape_set: str) -> dict[str, tuple[str, ...]]:
    return RANK_ENDINGS if shape_set in RANK_SHAPES else ENDINGS


@dataclass(frozen=True, slots=True)
class Config:
    """One kernel to compile, check and time."""

    product: str
    ending: str
    rows: int  # padded
    tuning: LinearTuning
    shape_set: str = ONE_RANK


def configs(product: str, ending: str, num_rows: int, prefetch_bytes: int, shape_set: str = ONE_RANK) -> list[Config]:
    """Every choice that fits, in every way of launching; endings that are not fused ones are launched plainly alone.

    Of a rank of several, launched dependently alone.
    """
    rows = padded_rows(num_rows)
    found = []
    for choice in RANK_CHOICES.get(shape_set, CHOICES)[product]:
        # Without a fused ending one weight tile is loaded a step: the same program would have half the columns.
        block_n = choice.block_n * (2 if product == "gate_up" and ending == "plain" else 1)
        width = block_n * (2 if ending == "silu" else 1) + rows
        stages = min(MAX_STAGES, SHARED_BYTES // choice.per_sm // (width * choice.block_k * DTYPE.itemsize))
        spills = ending == "silu" and block_n * rows > MAX_GATED_OUTPUTS
        if stages < 2 or spills:
            continue
        plain = LinearTuning(block_n, choice.block_k, choice.split, stages, swap=choice.swap, use_tma=choice.use_tma)
        tunings = [plain] if shape_set == ONE_RANK else []
        if ending == endings_of(shape_set)[product][0]:
            tunings.append(replace(plain, launch=Launch.AT_END, prefetch_bytes=prefetch_bytes))
        found += [Config(product, ending, rows, tuning, shape_set) for tuning in tunings]
    return found


def run_product(
    ending: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, tuning: LinearTuning | None
) -> torch.Tensor:
    """residual: [T, out], written with the ending "add"."""
    if ending == "add":
        return triton_linear.linear_add_few(x, weight, residual, tuning)
    if ending == "silu":
        return triton_linear.gate_up_silu_few(x, weight, tuning)
    return triton_linear.linear_few(x, weight, tuning)


def prepare_process() -> None:
    """Make this process compile for Hopper instead of launching."""
    torch.set_num_threads(1)
    compile_for_hopper()


def compile_config(config: Config) -> str | None:
    """In a process that `prepare_process` has prepared. Returns what went wrong."""
    shape = shapes_of(config.shape_set)[config.product]
    x = torch.empty(config.rows, shape.num_in, dtype=DTYPE)
    weight = torch.empty(shape.num_out, shape.num_in, dtype=DTYPE).t()
    residual = torch.empty(config.rows, shape.num_out, dtype=DTYPE)
    try:
        run_product(config.ending, x, weight, residual, config.tuning)
    except Exception as error:  # a tuning that does not compile is left out, whatever the reason
        return f"{type(error).__name__}: {error}"[:300]
    return None
