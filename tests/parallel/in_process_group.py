"""Runs the ranks of a tensor-parallel group as threads of one process; for tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from common.parallel.group import TensorParallelGroup

Result = TypeVar("Result")

TIMEOUT_S = 30.0


def run_ranks(
    size: int, store: Path, body: Callable[[TensorParallelGroup], Result], use_shared_memory: bool = True
) -> list[Result]:
    """`body` on every rank at once; its results in rank order."""

    def run_rank(rank: int) -> Result:
        group = TensorParallelGroup.open(
            rank, size, f"file://{store}", torch.device("cpu"), TIMEOUT_S, use_shared_memory
        )
        try:
            return body(group)
        finally:
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run_rank, range(size)))
