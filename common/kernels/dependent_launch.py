"""Programmatic dependent launch: which kernels of a decode step start before the kernel ahead has ended.

A dependent kernel starts when every program of the kernel ahead has triggered (`gdc_launch_dependents`) or ended. Its
`gdc_wait` returns when the kernel ahead is complete and what it wrote can be read. So that this holds for all that
came before as well, and for those who come after:

* At least one program of every dependent kernel waits, and so does each that touches what other kernels write: a
  kernel is complete only when those before it are.
* Small kernels trigger before they wait, as the first thing they do: the product behind them then fetches weights
  while the kernel ahead still runs. Products trigger after they have waited, never before. In a layer whose products
  are all fused attention alone is a small kernel.
* Before it waits, a kernel writes nothing. It reads weights, and, if a product or a kernel that is launched plainly
  comes between, what a step begins with: lengths, block tables, slots, angles. These are written by kernels that
  neither trigger nor are dependent, so they are complete when a product has waited.

A kernel that is launched plainly (a library's, say) ends before a dependent one starts, and starts when all before it
are complete: mixing them is always right.
"""
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from common.kernels.linear_tuning import Launch, LinearTuning
from common.kernels.triton_device import is_hopper


@dataclass(frozen=True, slots=True)
class LaunchPolicy:
    """Choices that change speed alone, for comparing them. Taken at launch: a captured graph keeps its own."""

    # Of a batch whose small kernels are launched dependently: on an H200, layers with 128 rows took 0.5 % less so
    # (`benchmarks.decode_layer`), and those with 256 once took 0.1 to 0.9 % more.
    max_rows: int = 128
    product_launch: Launch | None = None  # of products that are tuned to be dependent; none: as tuned


_policy = LaunchPolicy()


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


def by_policy(tuning: LinearTuning) -> LinearTuning:
    """The tuning, launched as the policy says instead if it says so."""
    if tuning.launch == Launch.PLAIN or _policy.product_launch is None:
        return tuning
    return replace(tuning, launch=_policy.product_launch)


@triton.jit
def start_next():
    """Let the kernel behind start when all programs of this one are here."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Until the kernel ahead, and with it all before, is complete."""
    tl.extra.cuda.gdc_wait()
