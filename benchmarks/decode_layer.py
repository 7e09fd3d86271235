"""The layers of an 8B decode step as a CUDA graph, launched in three ways: what dependent launch gains.

    python -m benchmarks.decode_layer [--batches 1 8 32 64 128 256] [--seconds 100] [--out FILE.json]

Runs the decoder itself, without its head, over random weights and shuffled KV blocks. First one layer is compared with
float64, then every way of launching must give the same bits as launching all kernels plainly, over inputs that change
from replay to replay. Prints microseconds of a layer, medians of rounds in which the ways take turns. Needs 55 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast
from unittest import mock

import torch

from benchmarks.kernel_timing import READ_BYTES_PER_S, relative_error
from benchmarks.layer_launches import compile_in_processes, compile_launch, served_launches
from benchmarks.layer_tunings import RANK_SHAPES
from benchmarks.random_model import BLOCK_SIZE, random_decoder, random_storage, read_shape
from common.kernels import cuda_backend, dependent_launch, reference, triton_decode, triton_linear
from common.kernels.backend import KernelBackend
from common.kernels.batch import KVShape, Span
from common.kernels.cuda_backend import TritonPlan
from common.kernels.dependent_launch import LaunchPolicy, using
from common.kernels.linear_tuning import Launch, padded_rows
from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup

CONTEXT: Final = 1024
# The first is what the others are compared with, the last is what is served.
WAYS: Final = {
    "all plain": LaunchPolicy(max_rows=0, product_launch=Launch.PLAIN),
    "products alone": LaunchPolicy(max_rows=0),
    "all dependent": LaunchPolicy(),
}
MAX_ERROR: Final = 2e-2  # of a layer in bfloat16
ROUNDS: Final = 5
ROUND_MS: Final = 60.0


class Step:
    """A batch of contexts in shuffled blocks, and the layers over it."""

    def __init__(self, decoder: Decoder, storage: KVStorage, batch: int, context: int = CONTEXT) -> None:
        """context: a multiple of the block size; `storage` must have blocks for `batch` of them."""
        self._decoder, self._storage, self._context = decoder, storage, context
        device, self._tables = decoder.device, _tables(batch, context, storage.shape.num_blocks)
        # Those whose embeddings are this rank's.
        self.inputs = torch.randint(len(decoder.shard.vocab), (2, batch), device=device)
        self._token_ids = self.inputs[0].clone()
        self.positions = torch.full((batch,), context - 1, device=device)
        self.plan = padding_plan(batch, context, storage.shape, device)
        assert self.plan.decode is not None
        self.plan.decode.context_lengths.fill_(context)
        self.plan.decode.block_tables[:, : self._tables.shape[1]] = self._tables.to(device)

    @torch.inference_mode()
    def capture(self, policy: LaunchPolicy) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The graph and its output, [batch, hidden]."""

        def run() -> torch.Tensor:
            cuda_backend.refresh_decode(self.plan)
            return self._decoder.forward(self._token_ids, self.positions, self.plan, self._storage.kv)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with using(policy):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = run()
        return graph, out

    @torch.inference_mode()
    def outputs(self, graph: torch.cuda.CUDAGraph, out: torch.Tensor) -> list[torch.Tensor]:
        """For both inputs, by turns and twice. What a kernel must not see is NaN or from the other input."""
        found = []
        for token_ids in (*self.inputs, *self.inputs):
            # The last token's K and V, which every layer writes.
            self._storage.kv[:, self._tables[:, -1].to(out.device), :, :, -1] = float("nan")
            self._token_ids.copy_(token_ids)
            out.fill_(float("nan"))
            graph.replay()
            found.append(out.clone())
        return found

    @torch.inference_mode()
    def wide(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The layers in float64 and plain torch; of a rank of several, with its own sums alone. [batch, hidden]"""
        own, kernels = self._decoder, cast(KernelBackend, reference)
        wide = Decoder(own.config, own.shard, _widened(own._weights), kernels, TensorParallelGroup.single())
        spans = [Span(1, self._context, table) for table in self._tables.tolist()]
        plan = kernels.plan_batch(spans, [None], self._storage.shape, torch.float64, own.device)
        return wide.forward(token_ids, self.positions, plan, self._storage.kv.double())


def padding_plan(batch: int, context: int, shape: KVShape, device: torch.device) -> TritonPlan:
    """For so many contexts."""
    columns = cuda_backend.table_columns(context // BLOCK_SIZE)
    return cuda_backend.plan_decode(batch, columns, [None], shape, torch.bfloat16, device)


def _tables(batch: int, context: int, num_blocks: int) -> torch.Tensor:
    """[batch, blocks of a context] int64"""
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(batch))
    return shuffled[: batch * (context // BLOCK_SIZE)].view(batch, -1)


def _widened(value: Any) -> Any:
    """The same with all tensors in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, tuple):
        return tuple(map(_widened, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    names = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **{name: _widened(getattr(value, name)) for name in names})


def check_layer(device: torch.device) -> float:
    """The relative error of one layer, launched dependently, against float64. Raises if it is too large."""
    decoder = random_decoder(read_shape("llama-3.1-8b", 1), device)
    step = Step(decoder, random_storage(decoder, 8 * CONTEXT // BLOCK_SIZE), 8)
    out = step.outputs(*step.capture(LaunchPolicy()))[0]
    error = relative_error(out, step.wide(step.inputs[0]))
    if error > MAX_ERROR:
        raise AssertionError(f"a layer is {error:.1e} from float64")
    return error


def time_ways(step: Step, num_layers: int, is_late: Callable[[], bool]) -> dict[str, float]:
    """By way: microseconds of a layer. Those whose output is wrong are printed and left out."""
    graphs = {}
    expected: list[torch.Tensor] = []
    for name, policy in WAYS.items():
        if is_late():
            print("out of time: ways left out", flush=True)
            break
        graph, out = step.capture(policy)
        found = step.outputs(graph, out)
        expected = expected or found
        errors = [relative_error(own, other) for own, other in zip(found, expected, strict=True)]
        if max(errors) > 0:
            print(f"WRONG: {name} differs by {max(errors):.1e}", flush=True)
            continue
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(replay_ms(graph) * 1e3 / num_layers)
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay, over as many as `ROUND_MS` holds."""
    num_replays, ms = 1, 0.0
    for _ in range(2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(num_replays):
            graph.replay()
        end.record()
        end.synchronize()
        ms = begin.elapsed_time(end) / num_replays
        num_replays = max(1, int(ROUND_MS / ms))
    return ms


def compile_attention(batch: int, policy: LaunchPolicy) -> None:
    """In a process that compiles for Hopper instead of launching."""
    with mock.patch.object(dependent_launch, "is_hopper", return_value=True), using(policy):
        plan = padding_plan(batch, CONTEXT, KVShape(8, 8, BLOCK_SIZE, 128), torch.device("cpu"))
        q = torch.empty(batch, 48, 128, dtype=torch.bfloat16)[:, :32]
        kv = torch.empty(8, 2, 8, BLOCK_SIZE, 128, dtype=torch.bfloat16)
        assert plan.decode is not None
        triton_decode.decode_attention(
            q, kv, plan.decode, None, 0.1, torch.empty(batch, 4096, dtype=torch.bfloat16), plan.decode_tuning
        )


def compile_all(batches: list[int], deadline: float) -> tuple[int, int]:
    """Fill the cache on disk in parallel. How many are missing, of how many: those compile when they are launched."""
    few = (WAYS["all plain"], WAYS["all dependent"])  # which launch attention and products differently
    calls: list[Callable[[], str | None]] = [partial(compile_attention, batch, way) for way in few for batch in batches]
    layer = RANK_SHAPES["8b"].layer()
    for policy in few:
        with using(policy):
            for rows in {padded_rows(batch) for batch in batches if batch <= triton_linear.MAX_ROWS}:
                calls += [partial(compile_launch, launch) for launch in served_launches(layer, rows)]
    failures = compile_in_processes(calls, deadline)
    return sum(failure is not None for failure in failures), len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--seconds", type=float, default=100, help="for everything, compiling included")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    missing, wanted = compile_all(arguments.batches, started + 0.4 * arguments.seconds)
    print(f"{wanted - missing} of {wanted} compiled in {time.monotonic() - started:.0f} s", flush=True)
    device = torch.device("cuda")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", flush=True)
    print(f"one layer is {check_layer(device):.1e} from float64, {time.monotonic() - started:.0f} s", flush=True)
    torch.cuda.empty_cache()
    config = read_shape("llama-3.1-8b")
    decoder = random_decoder(config, device)
    storage = random_storage(decoder, max(arguments.batches) * CONTEXT // BLOCK_SIZE)
    weight_bytes = RANK_SHAPES["8b"].layer().weight_bytes
    table: dict[int, dict[str, float]] = {}
    for batch in arguments.batches:
        step = Step(decoder, storage, batch)
        is_late = partial(lambda limit: time.monotonic() > limit, started + arguments.seconds)
        table[batch] = time_ways(step, config.num_layers, is_late)
        kv_bytes = batch * CONTEXT // BLOCK_SIZE * storage.kv[0, 0].nbytes
        table[batch]["floor"] = (weight_bytes + kv_bytes) / READ_BYTES_PER_S * 1e6
        print(f"batch {batch}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"µs of a layer at context {CONTEXT} | " + " | ".join(f"{batch}" for batch in table))
    for name in ("floor", *WAYS):
        print(f"{name} | " + " | ".join(f"{times[name]:.1f}" if name in times else "-" for times in table.values()))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1))
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
