"""Check the Triton kernels on a GPU against references in higher precision, then time them beside torch's own.

    python -m benchmarks.kernels [--out FILE.json] [--only NAME] [--sweep]

Inputs are fresh random data, outputs are poisoned before a check. A timing is the median over replays of a CUDA graph that
calls the kernel on several sets of inputs, together larger than the second-level cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.kernels import blocks_reference, reference, triton_backend, triton_decode, triton_prefill, triton_rows
from common.kernels import triton_prefill_hopper as hopper
from common.kernels.batch import KVShape, Span

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
SCALE = HEAD_DIM**-0.5
READ_BYTES_PER_S = 4.3e12  # device memory of an H200, read only
CACHE_BYTES = 200 << 20

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    kernel: str
    shape: str
    us: float
    rate: str
    share: float  # of the ceiling: device memory or matrix products
    torch_us: float | None
    error: float | None


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy_bytes_per_s: float
    matmul_flop_per_s: float


def median_us(calls: Sequence[Call], replays: int = 7) -> float:
    """Time of one call: the calls are captured into one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def measure_ceilings() -> Ceilings:
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    # Not `copy_`, which a graph replays on the copy engine.
    copy = 2 * source.numel() * 4 / median_us([lambda: torch.neg(source, out=target)])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return Ceilings(copy * 1e6, 2 * 8192**3 / median_us([lambda: a @ b] * 4) * 1e6)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite for NaN, so that poison never passes."""
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")


def num_sets(nbytes: int) -> int:
    return max(1, min(8, -(-CACHE_BYTES // nbytes)))


def make_spans(lengths: Sequence[tuple[int, int]], shuffled: bool) -> tuple[list[Span], KVShape]:
    """lengths: (num_queries, context_length) of each sequence."""
    counts = [-(-context // BLOCK_SIZE) for _, context in lengths]
    total = sum(counts)
    ids = iter((torch.randperm(total) if shuffled else torch.arange(total)).tolist())
    spans = [
        Span(queries, context, list(itertools.islice(ids, count)))
        for (queries, context), count in zip(lengths, counts, strict=True)
    ]
    return spans, KVShape(total, KV_HEADS, BLOCK_SIZE, HEAD_DIM)


def random_kv(shape: KVShape) -> torch.Tensor:
    size = (shape.num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
    return torch.randn(size, device=DEVICE, dtype=DTYPE)


def random_q(num_tokens: int) -> torch.Tensor:
    """A view of a qkv projection, as in the model."""
    return torch.randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)[:, :HEADS]


def check_attention(lengths: Sequence[tuple[int, int]], window: int | None, call: Callable[..., None]) -> float:
    """`call(q, kv, plan, window, out)` against float64."""
    spans, shape = make_spans(lengths, shuffled=True)
    kv, q = random_kv(shape), random_q(sum(queries for queries, _ in lengths))
    plan = triton_backend.plan_batch(spans, [window], shape, DTYPE, DEVICE)
    wide = reference.plan_batch(spans, [window], shape, torch.float64, DEVICE)
    expected = reference.attention(q.double(), kv.double(), wide, window, SCALE)
    out = torch.full((q.shape[0], HEADS * HEAD_DIM), float("nan"), device=DEVICE, dtype=DTYPE)
    call(q, kv, plan, window, out)
    first = out.clone()
    call(q, kv, plan, window, out)
    assert torch.equal(first, out), "two runs on the same input differ"
    return relative_error(out, expected)


PREFILL_CHECK = [(700, 2000), (129, 129), (64, 1000), (5, 5), (33, 97), (2, 640), (300, 301)]
DECODE_CHECK = [(1, n) for n in (1, 63, 64, 65, 4000, 128, 129, 700, 2, 9001, 64, 333)]


def run_prefill(tuning: triton_prefill.PrefillTuning | int | None) -> Callable[..., None]:
    """tuning: of the Triton kernel, or stages of the Hopper one, or None: what the backend takes."""

    def call(
        q: torch.Tensor, kv: torch.Tensor, plan: triton_backend.TritonPlan, window: int | None, out: torch.Tensor
    ) -> None:
        assert plan.prefill is not None
        if tuning is None:
            triton_backend.attention_into(q, kv, plan, window, SCALE, out)
        elif isinstance(tuning, int):
            hopper.prefill_attention(q, kv, plan.prefill, window, SCALE, out, num_stages=tuning)
        else:
            triton_prefill.prefill_attention(q, kv, plan.prefill, window, SCALE, out, tuning)

    return call


def run_decode(tuning: triton_decode.DecodeTuning | None) -> Callable[..., None]:
    def call(
        q: torch.Tensor, kv: torch.Tensor, plan: triton_backend.TritonPlan, window: int | None, out: torch.Tensor
    ) -> None:
        assert plan.decode is not None
        chosen = tuning or plan.decode_tuning
        if chosen.tile != plan.decode_tuning.tile:
            triton_decode.refresh(plan.decode, BLOCK_SIZE, chosen.tile)
        triton_decode.decode_attention(q, kv, plan.decode, window, SCALE, out, chosen)

    return call


def prefill_us(lengths: Sequence[tuple[int, int]], shuffled: bool, call: Callable[..., None], calls: int = 2) -> float:
    spans, shape = make_spans(lengths, shuffled)
    plan = triton_backend.plan_batch(spans, [None], shape, DTYPE, DEVICE)
    sets = [(random_q(sum(n for n, _ in lengths)), random_kv(shape)) for _ in range(calls)]
    out = torch.empty(sets[0][0].shape[0], HEADS * HEAD_DIM, device=DEVICE, dtype=DTYPE)
    return median_us([lambda q=q, kv=kv: call(q, kv, plan, None, out) for q, kv in sets], replays=5)


def prefill_flop(lengths: Sequence[tuple[int, int]]) -> float:
    pairs = sum(n * (context - n) + n * (n + 1) / 2 for n, context in lengths)
    return 4 * pairs * HEADS * HEAD_DIM


def sdpa_us(num_queries: int, num_keys: int, batch: int, backend: SDPBackend, causal: bool) -> float | None:
    sets = [
        [
            torch.randn(batch, heads, n, HEAD_DIM, device=DEVICE, dtype=DTYPE)
            for heads, n in ((HEADS, num_queries), (KV_HEADS, num_keys), (KV_HEADS, num_keys))
        ]
        for _ in range(2)
    ]
    try:
        with sdpa_kernel(backend):
            return median_us(
                [
                    lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True
                    )
                    for q, k, v in sets
                ],
                replays=5,
            )
    except RuntimeError:
        return None


def bench_prefill(ceilings: Ceilings) -> Iterator[Row]:
    call = run_prefill(None)
    error = check_attention(PREFILL_CHECK, None, call)
    windowed = check_attention(PREFILL_CHECK, 200, call)
    assert max(error, windowed) < 1e-2, (error, windowed)
    cases = [
        ("8k", [(8192, 8192)], False),
        ("8k", [(8192, 8192)], True),
        ("32k", [(32768, 32768)], False),
        ("32k", [(32768, 32768)], True),
        ("2k after 30k cached", [(2048, 32768)], True),
        ("16 × 2k", [(2048, 2048)] * 16, True),
    ]
    for name, lengths, shuffled in cases:
        us = prefill_us(lengths, shuffled, call)
        best = None
        if len(lengths) == 1 and lengths[0][0] == lengths[0][1]:
            n = lengths[0][0]
            times = [sdpa_us(n, n, 1, kind, True) for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)]
            best = min((time for time in times if time is not None), default=None)
        rate = prefill_flop(lengths) / us * 1e6
        order = "shuffled" if shuffled else "contiguous"
        yield Row(
            "prefill attention", f"{name}, {order}", us, f"{rate / 1e12:.0f} TFLOP/s", rate / ceilings.matmul_flop_per_s,
            best, error,
        )  # fmt: skip


DECODE_CASES = {
    "64 × 1k": [1024] * 64,
    "256 × 1k": [1024] * 256,
    "8 × 8k": [8192] * 8,
    "64 × 8k": [8192] * 64,
    "1 × 64k": [65536],
    "63 × 1k + 1 × 16k": [1024] * 63 + [16384],
    "127 × 512 + 1 × 8k": [512] * 127 + [8192],
    "1 × 1k": [1024],
}


def decode_us(lengths: Sequence[int], call: Callable[..., None]) -> tuple[float, float]:
    """Time of a call and the bytes of K and V it reads."""
    spans, shape = make_spans([(1, n) for n in lengths], shuffled=True)
    plan = triton_backend.plan_batch(spans, [None], shape, DTYPE, DEVICE)
    nbytes = sum(lengths) * 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    sets = [(random_q(len(lengths)), random_kv(shape)) for _ in range(num_sets(nbytes))]
    out = torch.empty(len(lengths), HEADS * HEAD_DIM, device=DEVICE, dtype=DTYPE)
    repeats = max(1, 8 // len(sets))
    return median_us([lambda q=q, kv=kv: call(q, kv, plan, None, out) for q, kv in sets * repeats]), nbytes


def bench_decode(ceilings: Ceilings) -> Iterator[Row]:
    del ceilings
    call = run_decode(None)
    error = check_attention(DECODE_CHECK, None, call)
    windowed = check_attention(DECODE_CHECK, 200, call)
    assert max(error, windowed) < 1e-2, (error, windowed)
    for name, lengths in DECODE_CASES.items():
        us, nbytes = decode_us(lengths, call)
        even = len(set(lengths)) == 1
        torch_us = sdpa_us(1, lengths[0], len(lengths), SDPBackend.FLASH_ATTENTION, False) if even else None
        rate = nbytes / us * 1e6
        yield Row("decode attention", name, us, f"{rate / 1e12:.2f} TB/s", rate / READ_BYTES_PER_S, torch_us, error)


def bench_rows(ceilings: Ceilings) -> Iterator[Row]:
    num_rows, hidden, eps = 8192, 4096, 1e-5
    x, residual = (torch.randn(num_rows, hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
    weight, bias = (torch.randn(hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
    gate_up = torch.randn(num_rows, 2 * 14336, device=DEVICE, dtype=DTYPE)
    wide = x.double()
    total = x + residual
    cases: list[tuple[str, str, Call, Call, torch.Tensor, int]] = [
        ("RMSNorm", "8192 × 4096", lambda: triton_rows.rms_norm(x, weight, eps),
         lambda: functional.rms_norm(x, (hidden,), weight, eps),
         functional.rms_norm(wide, (hidden,), weight.double(), eps), 2 * x.nbytes),
        ("add + RMSNorm", "8192 × 4096", lambda: triton_rows.add_rms_norm(x, residual, weight, eps),
         lambda: functional.rms_norm(residual.add_(x), (hidden,), weight, eps),
         functional.rms_norm(total.double(), (hidden,), weight.double(), eps), 4 * x.nbytes),
        ("SiLU · mul", "8192 × 2 · 14336", lambda: triton_rows.silu_mul(gate_up),
         lambda: functional.silu(gate_up[:, :14336]) * gate_up[:, 14336:],
         functional.silu(gate_up[:, :14336].float()) * gate_up[:, 14336:].float(), gate_up.nbytes * 3 // 2),
        ("LayerNorm", "8192 × 4096", lambda: triton_rows.layer_norm(x, weight, bias, eps),
         lambda: functional.layer_norm(x, (hidden,), weight, bias, eps),
         functional.layer_norm(wide, (hidden,), weight.double(), bias.double(), eps), 2 * x.nbytes),
        ("softmax", "8192 × 4096", lambda: triton_rows.softmax(x), lambda: x.softmax(-1), wide.softmax(-1), 2 * x.nbytes),
    ]  # fmt: skip
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=DEVICE)
    flush_us = median_us([lambda: flush.zero_()] * 8)
    for name, shape, call, torch_call, expected, nbytes in cases:
        result = call()
        assert isinstance(result, torch.Tensor)
        error = relative_error(result, expected)
        assert error < 1e-2, (name, error)
        residual.copy_(total).sub_(x)
        us, torch_us = (median_us([one, lambda: flush.zero_()] * 8) * 2 - flush_us for one in (call, torch_call))
        yield memory_row(name, shape, us, nbytes, ceilings, torch_us, error)
    yield from bench_rope(ceilings, flush, flush_us)


def memory_row(
    name: str, shape: str, us: float, nbytes: int, ceilings: Ceilings, torch_us: float | None, error: float
) -> Row:
    rate = nbytes / us * 1e6
    return Row(name, shape, us, f"{rate / 1e12:.2f} TB/s", rate / ceilings.copy_bytes_per_s, torch_us, error)


def bench_rope(ceilings: Ceilings, flush: torch.Tensor, flush_us: float) -> Iterator[Row]:
    num_tokens = 8192
    spans, shape = make_spans([(num_tokens, num_tokens)], shuffled=True)
    plan = triton_backend.plan_batch(spans, [None], shape, DTYPE, DEVICE)
    plain = reference.plan_batch(spans, [None], shape, torch.float32, DEVICE)
    qkv = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    cos, sin = (torch.randn(num_tokens, 1, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    norm = torch.randn(HEAD_DIM, device=DEVICE, dtype=DTYPE)
    kv = torch.full_like(random_kv(shape), float("nan"))
    wide_kv = kv.float()
    wide = [tensor.float() for tensor in (qkv, cos, sin, norm)]
    expected = reference.qk_norm_rope_store(wide[0], HEADS, wide[1], wide[2], wide[3], wide[3], 1e-5, wide_kv, plain)
    work = qkv.clone()
    out = triton_backend.qk_norm_rope_store(work, HEADS, cos, sin, norm, norm, 1e-5, kv, plan)
    error = max(relative_error(out, expected), relative_error(kv, wide_kv))
    assert error < 1e-2, error

    def call() -> object:
        return triton_backend.qk_norm_rope_store(work, HEADS, cos, sin, norm, norm, 1e-5, kv, plan)

    def torch_call() -> object:
        return reference.qk_norm_rope_store(work, HEADS, cos, sin, norm, norm, 1e-5, kv, plain)

    us, torch_us = (median_us([one, lambda: flush.zero_()] * 4) * 2 - flush_us for one in (call, torch_call))
    nbytes = 2 * qkv.nbytes + 2 * cos.nbytes
    yield memory_row("QK-norm + rotary + store", "8192 tokens", us, nbytes, ceilings, torch_us, error)


def bench_blocks(ceilings: Ceilings) -> Iterator[Row]:
    num_layers, num_blocks, num_ids = 32, 300, 128
    size = (num_layers, num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    kv = torch.randn(size, device=DEVICE, dtype=DTYPE)
    ids = torch.randperm(num_blocks, device=DEVICE)[:num_ids]
    for first, heads in ((0, KV_HEADS), (2, 4)):
        payload = torch.full(
            (num_layers, num_ids, 2, heads, BLOCK_SIZE, HEAD_DIM), float("nan"), device=DEVICE, dtype=DTYPE
        )
        expected = torch.empty_like(payload)
        digest = blocks_reference.gather_blocks(kv, ids, first, heads, expected)
        assert triton_backend.gather_blocks(kv, ids, first, heads, payload) == digest, "digests differ"
        assert torch.equal(payload, expected)
        target, plain_target = torch.zeros_like(kv), torch.zeros_like(kv)
        blocks_reference.scatter_blocks(plain_target, ids, first, heads, payload)
        found = triton_backend.scatter_with_digest(target, ids, first, heads, payload)
        assert triton_backend.digest_value(found) == digest
        assert torch.equal(target, plain_target)
        del plain_target
        shape = f"8k tokens, 32 layers, {heads} of {KV_HEADS} heads"
        arguments = (ids, first, heads, payload)
        gather_us = median_us([lambda a=arguments: triton_backend.gather_with_digest(kv, *a)])
        scatter_us = median_us([lambda a=arguments: triton_backend.scatter_with_digest(kv, *a)])
        yield memory_row("gather + digest", shape, gather_us, 2 * payload.nbytes, ceilings, None, 0.0)
        yield memory_row("verify + scatter", shape, scatter_us, 2 * payload.nbytes, ceilings, None, 0.0)


def sweep(which: str) -> None:
    """Times of other tunings, to choose the defaults by."""
    tunings: list[triton_prefill.PrefillTuning | int] = [
        2,
        3,
        triton_prefill.PrefillTuning(128, 64, 8, 3, True, False),
        triton_prefill.PrefillTuning(128, 64, 8, 4, True, False),
        triton_prefill.PrefillTuning(128, 128, 8, 2, False, False),
        triton_prefill.PrefillTuning(128, 64, 8, 3, True, True),
    ]
    for tuning in tunings:
        if which != ("hopper" if isinstance(tuning, int) else "prefill"):
            continue
        call = run_prefill(tuning)
        errors = [check_attention(PREFILL_CHECK, window, call) for window in (None, 200)]
        times = [prefill_us([(n, n)], True, call) for n in (2048, 8192, 32768)]
        rates = [prefill_flop([(n, n)]) / us / 1e6 for n, us in zip((2048, 8192, 32768), times, strict=True)]
        print("prefill", tuning, [f"{e:.1e}" for e in errors], " ".join(f"{rate:.0f}" for rate in rates), flush=True)
    names = ("64 × 1k", "64 × 8k", "8 × 8k", "1 × 64k", "63 × 1k + 1 × 16k", "1 × 1k")
    for tile, tma, warps, stages, programs, early in DECODE_SWEEP if which == "decode" else ():
        tuned = triton_decode.DecodeTuning(tile, programs, warps, stages, 2, tma, early)
        call = run_decode(tuned)
        error = check_attention(DECODE_CHECK, None, call)
        shares = []
        for name in names:
            us, nbytes = decode_us(DECODE_CASES[name], call)
            shares.append(f"{us:.1f}us {nbytes / us * 1e6 / READ_BYTES_PER_S:.0%}")
        print("decode", tuned, f"{error:.1e}", *shares, flush=True)


DECODE_SWEEP = [
    (64, True, 4, 5, 2, 0),
    (64, True, 4, 5, 2, 1),
    (64, True, 4, 5, 2, 2),
    (64, True, 4, 7, 2, 2),
    (64, True, 4, 5, 3, 2),
    (64, True, 2, 3, 4, 2),
    (64, True, 2, 5, 2, 2),
    (64, True, 2, 5, 3, 2),
    (64, True, 2, 7, 2, 2),
    (64, True, 4, 9, 1, 2),
]


SUITES = {"prefill": bench_prefill, "decode": bench_decode, "rows": bench_rows, "blocks": bench_blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=SUITES)
    parser.add_argument("--sweep", choices=("hopper", "prefill", "decode"))
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep(arguments.sweep)
        return
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, "
        f"matrix product {ceilings.matmul_flop_per_s / 1e12:.0f} TFLOP/s"
    )
    print("| kernel | shape | µs | rate | share | torch µs | error |\n|---|---|---|---|---|---|---|")
    rows = []
    for name, suite in SUITES.items():
        for row in suite(ceilings) if arguments.only in (None, name) else ():
            rows.append(row)
            torch_us = "–" if row.torch_us is None else f"{row.torch_us:.1f}"
            print(
                f"| {row.kernel} | {row.shape} | {row.us:.1f} | {row.rate} | {row.share:.0%} | {torch_us} | {row.error:.1e} |",
                flush=True,
            )
        torch.cuda.empty_cache()
    if arguments.out:
        table = {
            "device": torch.cuda.get_device_name(),
            "ceilings": asdict(ceilings),
            "rows": [asdict(r) for r in rows],
        }
        arguments.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
