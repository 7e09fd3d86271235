"""The ways to launch a step that `benchmarks.decode_layer` compares, and compiling what they need in parallel."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Final
from unittest import mock

import torch

from benchmarks.few_rows_configs import SHAPES, Config, compile_config, prepare_process
from benchmarks.random_model import BLOCK_SIZE
from common.kernels import cuda_backend, dependent_launch, triton_decode, triton_linear
from common.kernels.batch import KVShape
from common.kernels.cuda_backend import TritonPlan
from common.kernels.dependent_launch import LaunchPolicy, by_policy, using
from common.kernels.linear_tuning import Launch, default_tuning, padded_rows

CONTEXT: Final = 1024
COMPILERS: Final = 12
START: Final = Launch.AT_START


@dataclass(frozen=True, slots=True)
class Way:
    """A way of launching a step."""

    name: str
    policy: LaunchPolicy
    min_tiles: int | None = None  # of a program of attention; none: as tuned

    def plan(self, plan: TritonPlan) -> TritonPlan:
        tuning = plan.decode_tuning
        own = tuning if self.min_tiles is None else dataclasses.replace(tuning, min_tiles=self.min_tiles)
        return dataclasses.replace(plan, decode_tuning=own)


WAYS: Final = (
    Way("all plain", LaunchPolicy(max_rows=0, product_launch=Launch.PLAIN)),  # what the others are compared with
    Way("products alone", LaunchPolicy(max_rows=0)),
    Way("all", LaunchPolicy(attention_fetch_tiles=0)),
    Way("all, K and V fetched", LaunchPolicy()),
    Way("products trigger late", LaunchPolicy(product_launch=Launch.AT_END)),
    Way("early", LaunchPolicy(product_launch=START)),
    Way("early, 16 MiB", LaunchPolicy(product_launch=START, product_fetch_bytes=16 << 20)),
    Way("early, 34 MiB", LaunchPolicy(product_launch=START, product_fetch_bytes=34 << 20)),
    Way("early, 16 MiB, 5 stages", LaunchPolicy(product_launch=START, product_fetch_bytes=16 << 20, product_stages=5)),
    Way("early, 16 MiB, 4 tiles", LaunchPolicy(256, START, 16 << 20, attention_fetch_tiles=4)),
    Way("early, 16 MiB, shares of 1", LaunchPolicy(256, START, 16 << 20), min_tiles=1),
)


def compile_attention(batch: int, way: Way) -> None:
    """In a process that compiles for Hopper instead of launching."""
    with mock.patch.object(dependent_launch, "is_hopper", return_value=True), using(way.policy):
        plan = way.plan(padding_plan(batch, KVShape(8, 8, BLOCK_SIZE, 128), torch.device("cpu")))
        q = torch.empty(batch, 48, 128, dtype=torch.bfloat16)[:, :32]
        kv = torch.empty(8, 2, 8, BLOCK_SIZE, 128, dtype=torch.bfloat16)
        assert plan.decode is not None
        triton_decode.decode_attention(
            q, kv, plan.decode, None, 0.1, torch.empty(batch, 4096, dtype=torch.bfloat16), plan.decode_tuning
        )


def compile_all(batches: list[int], deadline: float) -> tuple[int, int]:
    """Fill the cache on disk in parallel. How many are missing, of how many: those compile when they are launched."""
    calls: set[Callable[[], object]] = set()
    configs = set()
    for way in WAYS:
        with using(way.policy):
            for name, shape in SHAPES.items():
                gated = name == "gate_up"
                for rows in {padded_rows(batch) for batch in batches if batch <= triton_linear.MAX_ROWS}:
                    columns = shape.num_out // 2 if gated else shape.num_out
                    tuning = by_policy(
                        default_tuning(shape.num_in, columns, gated, rows), shape.num_out, 2 * shape.num_in
                    )
                    configs.add(Config(name, "silu" if gated else "plain", rows, tuning))
        calls |= {partial(compile_attention, batch, way) for batch in batches}
    calls |= {partial(compile_config, config) for config in configs}
    pool = ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn"), initializer=prepare_process)
    done, _ = wait([pool.submit(call) for call in calls], timeout=max(0.1, deadline - time.monotonic()))
    pool.shutdown(wait=False, cancel_futures=True)
    return len(calls) - sum(future.exception() is None and future.result() is None for future in done), len(calls)


def padding_plan(batch: int, shape: KVShape, device: torch.device) -> TritonPlan:
    """For so many contexts."""
    columns = cuda_backend.table_columns(CONTEXT // BLOCK_SIZE)
    return cuda_backend.plan_decode(batch, columns, [None], shape, torch.bfloat16, device)
