"""Matrix products of a decode step, a layer's four and the head: cuBLAS with either weight layout, and the Triton kernel.

Each is checked against float32 and timed inside a CUDA graph over rotating weights, so that none comes from the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from common.kernels import triton_linear
from common.kernels.triton_linear import LinearTuning

READ_BYTES_PER_S = 4.32e12
SHAPES = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "head": (4096, 128256),
}
TUNINGS = [
    LinearTuning(16, 256, 4, 5),
    LinearTuning(16, 512, 4, 4),
    LinearTuning(32, 128, 4, 6),
    LinearTuning(32, 256, 4, 4),
    LinearTuning(32, 256, 8, 4),
    LinearTuning(64, 128, 4, 4),
    LinearTuning(32, 256, 4, 4, True),
    LinearTuning(64, 128, 4, 5, True),
    LinearTuning(64, 256, 4, 3, True),
]
Product = Callable[[torch.Tensor, torch.Tensor], object]


def graph_us(product: Product, x: torch.Tensor, weights: list[torch.Tensor], repeat: int = 7) -> float:
    """Median time of one product, in a graph that runs through the weights twice."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        product(x, weights[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for weight in weights * 2:
            product(x, weight)
    times = []
    for _ in range(repeat + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (2 * len(weights)))
    return statistics.median(times[1:])


def candidates(num_rows: int, num_inputs: int, num_outputs: int, tunings: list[LinearTuning]) -> dict[str, Product]:
    found: dict[str, Product] = {"cublas": functional.linear}
    if num_rows <= triton_linear.MAX_ROWS:
        for tuning in tunings:
            if num_outputs % tuning.outputs == 0 and num_inputs % tuning.inputs == 0:
                name = f"{tuning.outputs}x{tuning.inputs}w{tuning.num_warps}s{tuning.num_stages}" + "t" * tuning.use_tma
                found[name] = lambda x, w, t=tuning: triton_linear.linear(x, w, t)  # type: ignore[misc]
    return found


def bench(rows: list[int], tunings: list[LinearTuning], out: Path | None) -> None:
    table = []
    for name, (num_inputs, num_outputs) in SHAPES.items():
        num_weights = max(2, 400_000_000 // (num_inputs * num_outputs * 2))
        weights = [
            torch.randn(num_outputs, num_inputs, dtype=torch.bfloat16, device="cuda") * num_inputs**-0.5
            for _ in range(num_weights)
        ]
        for num_rows in rows:
            x = torch.randn(num_rows, num_inputs, dtype=torch.bfloat16, device="cuda")
            expected = x.float() @ weights[0].float().t()
            floor_us = max(weights[0].nbytes / READ_BYTES_PER_S, 2 * num_rows * weights[0].numel() / 780e12) * 1e6
            times: dict[str, float] = {}
            for label, product in candidates(num_rows, num_inputs, num_outputs, tunings).items():
                try:
                    result = product(x, weights[0])
                    assert isinstance(result, torch.Tensor)
                    error = float((result.float() - expected).norm() / expected.norm())
                    if not error < 1e-2:
                        print(f"{name} {num_rows} {label}: error {error}")
                        continue
                    times[label] = graph_us(product, x, weights)
                except Exception as error:  # a tuning that does not fit must not end the table
                    print(f"{name} {num_rows} {label}: {type(error).__name__} {str(error)[:100]}")
            swapped = [weight.t().contiguous() for weight in weights]
            times["cublas [in, out]"] = graph_us(lambda x, w: torch.mm(x, w), x, swapped)
            del swapped
            ranked = sorted(times.items(), key=lambda pair: pair[1])
            table.append({"linear": name, "rows": num_rows, "floor_us": floor_us, "us": times})
            best = ", ".join(f"{label} {us:.1f}" for label, us in ranked[:4])
            print(
                f"| {name} | {num_rows} | {floor_us:.1f} | cublas {times['cublas']:.1f} "
                f"| [in, out] {times['cublas [in, out]']:.1f} | {best} |",
                flush=True,
            )
        del weights
        torch.cuda.empty_cache()
    if out:
        out.write_text(json.dumps(table, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--cublas-only", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench(arguments.rows, [] if arguments.cublas_only else TUNINGS, arguments.out)


if __name__ == "__main__":
    main()
