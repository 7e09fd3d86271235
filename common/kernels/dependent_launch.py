"""Programmatic dependent launch: which kernels of a decode step start before the kernel ahead has ended.

A dependent kernel starts when every program of the kernel ahead has triggered (`gdc_launch_dependents`) or ended. Its
`gdc_wait` returns when the kernel ahead is complete and what it wrote can be read. So that this holds for all that
came before as well, and for those who come after:

* At least one program of every dependent kernel waits, and so does each that touches what other kernels write: a
  kernel is complete only when those before it are.
* Small kernels trigger before they wait, as the first thing they do: the product behind them then fetches weights
  while the kernel ahead still runs. Products trigger after they have waited, never before.
* Before it waits, a kernel writes nothing. It reads weights, and, if a product or a kernel that is launched plainly
  comes between, what a step begins with: lengths, block tables, slots, angles. These are written by kernels that
  neither trigger nor are dependent, so they are complete when a product has waited.

A kernel that is launched plainly (a library's, say) ends before a dependent one starts, and starts when all before it
are complete: mixing them is always right.
"""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
import triton.language as tl

from common.kernels.linear_tuning import Launch, LinearTuning
from common.kernels.triton_device import is_hopper

PIECE_BYTES: Final = 256  # of a weight row, fetched by one instruction


@dataclass(frozen=True, slots=True)
class LaunchPolicy:
    """Choices that change speed alone. Taken at launch: a captured graph keeps what it was captured with."""

    max_rows: int = 256  # of a batch whose small kernels are launched dependently; more are worth no early start
    product_launch: Launch | None = None  # of products that are tuned to be dependent; none: as tuned
    product_fetch_bytes: int | None = None  # of a weight, at most, before its product waits; none: as tuned
    product_stages: int | None = None  # at most: what shared memory they leave, the next product starts in
    attention_fetch_tiles: int = 2  # of K and V, by each program of decode attention before it waits


_policy = LaunchPolicy()


def policy() -> LaunchPolicy:
    return _policy


@contextmanager
def using(other: LaunchPolicy) -> Iterator[None]:
    """Launch by another policy meanwhile; for the thread that launches."""
    global _policy
    before = _policy
    _policy = other
    try:
        yield
    finally:
        _policy = before


def is_dependent(num_rows: int, device: torch.device) -> bool:
    """Whether a small kernel over so many rows, tokens of a batch, is launched dependently."""
    return num_rows <= _policy.max_rows and is_hopper(device)


def launch_options(dependent: bool) -> dict[str, Any]:
    """For the launch of a Triton kernel."""
    return {"launch_pdl": True} if dependent else {}


def by_policy(tuning: LinearTuning, num_rows: int, row_bytes: int) -> LinearTuning:
    """The tuning, with what the policy says instead, of a product whose weight has `num_rows` rows of `row_bytes`."""
    if tuning.launch == Launch.PLAIN:
        return tuning
    if _policy.product_launch is not None:
        tuning = replace(tuning, launch=_policy.product_launch)
    if _policy.product_stages is not None:
        tuning = replace(tuning, num_stages=min(tuning.num_stages, _policy.product_stages))
    if _policy.product_fetch_bytes is not None:
        share = min(row_bytes // tuning.split, _policy.product_fetch_bytes // (num_rows * tuning.split))
        pieces = share // PIECE_BYTES
        # The kernel takes powers of two.
        tuning = replace(tuning, prefetch_bytes=PIECE_BYTES << pieces.bit_length() - 1 if pieces else 0)
    return tuning


@triton.jit
def start_next():
    """Let the kernel behind start when all programs of this one are here."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Until the kernel ahead, and with it all before, is complete."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(at, NUM_BYTES: tl.constexpr):
    """Ask for NUM_BYTES, a multiple of 16, from each address on to be in the second-level cache. Waits for nothing."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r", [at.to(tl.int64), NUM_BYTES], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
