"""Matrix products of a decoder layer and of the head through cuBLAS, with either order of the weight in memory.

Each is timed inside a CUDA graph over rotating weights, so that none comes from the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.random_model import read_shape

READ_BYTES_PER_S, FLOP_PER_S = 4.32e12, 780e12
_ROTATED_BYTES = 800_000_000


def graph_us(x: torch.Tensor, weights: list[torch.Tensor], repeat: int = 7) -> float:
    """Median time of one product, in a graph that runs through the weights [in, out] twice."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.mm(x, weights[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for weight in weights * 2:
            torch.mm(x, weight)
    times = []
    for _ in range(repeat + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / (2 * len(weights)))
    return statistics.median(times[1:])


def shapes(name: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a model's products, unsharded."""
    config = read_shape(name)
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    return {
        "qkv": (hidden, heads + 2 * config.num_kv_heads * config.head_dim),
        "o": (heads, hidden),
        "gate_up": (hidden, 2 * config.intermediate_size),
        "down": (config.intermediate_size, hidden),
        "head": (hidden, config.vocab_size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 2048])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = []
    print("| product | rows | floor µs | [out, in] | [in, out] |\n|---|---|---|---|---|")
    for name, (num_inputs, num_outputs) in shapes(arguments.shape).items():
        num_weights = max(2, _ROTATED_BYTES // (num_inputs * num_outputs * 2))
        shape = (num_outputs, num_inputs)
        weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(num_weights)]
        orders = {"[out, in]": [w.t() for w in weights], "[in, out]": [w.t().contiguous() for w in weights]}
        for rows in arguments.rows:
            x = torch.randn(rows, num_inputs, dtype=torch.bfloat16, device="cuda")
            floor_us = max(weights[0].nbytes / READ_BYTES_PER_S, 2 * rows * weights[0].numel() / FLOP_PER_S) * 1e6
            times = {order: graph_us(x, ordered) for order, ordered in orders.items()}
            table.append({"product": name, "rows": rows, "floor_us": floor_us, "us": times})
            print(f"| {name} | {rows} | {floor_us:.1f} | " + " | ".join(f"{us:.1f}" for us in times.values()) + " |")
        del weights, orders
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
