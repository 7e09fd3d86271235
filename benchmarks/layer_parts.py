"""Where the time of a decode layer goes: each of its kernels in a chain of its own, and all together.

    python -m benchmarks.layer_parts [--batches 1 8 32 64] [--out FILE.json]

A chain runs one kernel of all 32 layers of an 8B shape one after the other in a CUDA graph, launched as a step launches
them, each layer with its own weights or KV blocks, so that nothing is in a cache. *Over*: what a call takes beyond
reading its bytes at 4.3 TB/s: beginning, ending and what its tiles cost. Needs one GPU and 30 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.decode_layer import CONTEXT, Step
from benchmarks.kernel_timing import READ_BYTES_PER_S
from benchmarks.random_model import BLOCK_SIZE, random_decoder, random_storage, read_shape
from common.kernels import cuda_backend
from common.kernels.scaled_rows import NormedRows
from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder

KERNELS: Final = ("qkv", "attention", "o", "gate_up", "down")
ROUNDS: Final = 7
REPLAYS: Final = 6  # of a round


class Chains:
    """The kernels of a batch's layers. What is left out gives the same in every layer."""

    def __init__(self, decoder: Decoder, storage: KVStorage, batch: int) -> None:
        step = Step(decoder, storage, batch)
        config, device = decoder.config, decoder.device
        self._layers, self._kv, self._plan = decoder._weights.layers, storage.kv.unbind(), step.plan
        self._rotation = decoder._rope.rotation(step.positions)
        self._num_heads, self._head_dim, self._eps = config.num_heads, config.head_dim, config.rms_norm_eps
        self._residual, self._attended = (
            torch.randn(batch, config.hidden_size, dtype=decoder.dtype, device=device) for _ in range(2)
        )
        self._q = torch.randn(batch, config.num_heads, config.head_dim, dtype=decoder.dtype, device=device)
        self._gated = torch.randn(batch, config.intermediate_size, dtype=decoder.dtype, device=device)
        self._normed = self._add(self._attended, self._layers[0].o.weight)

    def _add(self, x: torch.Tensor, weight: torch.Tensor) -> NormedRows:
        norm = self._layers[0].post_norm
        return cuda_backend.linear_add_norm(x, weight, None, self._residual, norm, self._eps)

    def run(self, kernels: Sequence[str]) -> None:
        """Every layer's, in the order of a layer."""
        cuda_backend.refresh_decode(self._plan)
        normed, cos, sin = self._normed, self._rotation.cos, self._rotation.sin
        for layer, kv_layer in zip(self._layers, self._kv, strict=True):
            q, attended, gated = self._q, self._attended, self._gated
            if "qkv" in kernels:
                heads, weight = self._num_heads, layer.qkv.weight
                q = cuda_backend.qkv_rope_store(
                    normed, weight, None, heads, cos, sin, None, None, self._eps, kv_layer, self._plan
                )
            if "attention" in kernels:
                attended = cuda_backend.attention(q, kv_layer, self._plan, None, self._head_dim**-0.5)
            if "o" in kernels:
                normed = self._add(attended, layer.o.weight)
            if "gate_up" in kernels:
                gated = cuda_backend.gate_up_silu(normed, layer.gate_up.weight, None)
            if "down" in kernels:
                normed = self._add(gated, layer.down.weight)

    @torch.inference_mode()
    def time_us(self, kernels: Sequence[str]) -> float:
        """Of one layer; the median of rounds of replays."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(kernels)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run(kernels)
        times: list[float] = []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            graph.replay()
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / REPLAYS / len(self._layers))
        return statistics.median(times)

    def num_bytes(self, kernels: Sequence[str]) -> int:
        """That a layer's kernels must read."""
        layer = self._layers[0]
        weights = {name: getattr(layer, name).weight.nbytes for name in KERNELS if name != "attention"}
        read = weights | {"attention": self._q.shape[0] * CONTEXT // BLOCK_SIZE * self._kv[0][0].nbytes}
        return sum(read[name] for name in kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    decoder = random_decoder(read_shape("llama-3.1-8b"), device)
    storage = random_storage(decoder, max(args.batches) * CONTEXT // BLOCK_SIZE)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; µs of a layer at context {CONTEXT}, and over")
    chosen = [(name,) for name in KERNELS] + [tuple(name for name in KERNELS if name != "attention"), KERNELS]
    names = [chain[0] if len(chain) == 1 else "all products" if len(chain) == 4 else "all" for chain in chosen]
    print(f"| batch | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    table: dict[int, dict[str, dict[str, float]]] = {}
    for batch in args.batches:
        chains = Chains(decoder, storage, batch)
        table[batch] = {}
        for name, chain in zip(names, chosen, strict=True):
            us = chains.time_us(chain)
            table[batch][name] = {"us": us, "over_us": us - chains.num_bytes(chain) / READ_BYTES_PER_S * 1e6}
        cells = [f"{one['us']:.1f} / {one['over_us']:.1f}" for one in table[batch].values()]
        print(f"| {batch} | {' | '.join(cells)} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
