"""Check the Triton kernels on a GPU against references in higher precision, then time them beside torch's own.

    python -m benchmarks.kernels [--out FILE.json] [--only NAME]

Inputs are fresh random data in the shapes of an 8B model; outputs are poisoned before a check.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import library_rows
from benchmarks.kernel_timing import (
    CACHE_BYTES,
    READ_BYTES_PER_S,
    CacheFlush,
    Call,
    Ceilings,
    Row,
    measure_ceilings,
    median_us,
    memory_row,
    relative_error,
)
from common.kernels import blocks_reference, cuda_backend, reference, triton_backend, triton_rows
from common.kernels.batch import KVShape, Span

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
HIDDEN, INTERMEDIATE, TOKENS, EPS = 4096, 14336, 8192, 1e-5
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
MAX_ERROR: Final = 1e-2  # what rounding to bfloat16 explains

PREFILL_CHECK = [(700, 2000), (129, 129), (64, 1000), (5, 5), (33, 97), (2, 640), (300, 301)]
DECODE_CHECK = [(1, n) for n in (1, 63, 64, 65, 4000, 128, 129, 700, 2, 9001, 64, 333)]
PREFILL_CASES: Final = [
    ("8k, contiguous", [(8192, 8192)], False),
    ("8k, shuffled", [(8192, 8192)], True),
    ("32k, contiguous", [(32768, 32768)], False),
    ("32k, shuffled", [(32768, 32768)], True),
    ("2k after 30k cached, shuffled", [(2048, 32768)], True),
    ("16 x 2k, shuffled", [(2048, 2048)] * 16, True),
]
DECODE_CASES: Final = {
    "1 x 1k": [1024],
    "1 x 8k": [8192],
    "8 x 1k": [1024] * 8,
    "64 x 1k": [1024] * 64,
    "8 x 8k": [8192] * 8,
    "1 x 64k": [65536],
    "63 x 1k + 1 x 16k": [1024] * 63 + [16384],
    "256 x 1k": [1024] * 256,
    "64 x 8k": [8192] * 64,
}


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE, dtype=DTYPE)


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
    return randn(shape.num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)


def random_q(num_tokens: int) -> torch.Tensor:
    """A view of a qkv projection, as in the model."""
    return randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)[:, :HEADS]


def check_attention(lengths: Sequence[tuple[int, int]], window: int | None) -> float:
    """Error against float64. Asserts that two runs agree to the bit."""
    spans, shape = make_spans(lengths, shuffled=True)
    kv, q = random_kv(shape), random_q(sum(queries for queries, _ in lengths))
    plan = cuda_backend.plan_batch(spans, [window], shape, DTYPE, DEVICE)
    wide = reference.plan_batch(spans, [window], shape, torch.float64, DEVICE)
    expected = reference.attention(q.double(), kv.double(), wide, window, SCALE)
    outs = [torch.full((q.shape[0], HEADS * HEAD_DIM), float("nan"), device=DEVICE, dtype=DTYPE) for _ in range(2)]
    for out in outs:
        triton_backend.attention_into(q, kv, plan, window, SCALE, out)
    assert torch.equal(*outs), "two runs on the same input differ"
    return relative_error(outs[0], expected)


def attention_us(lengths: Sequence[tuple[int, int]], shuffled: bool) -> float:
    spans, shape = make_spans(lengths, shuffled)
    plan = cuda_backend.plan_batch(spans, [None], shape, DTYPE, DEVICE)
    num_tokens = sum(queries for queries, _ in lengths)
    nbytes = shape.num_blocks * 2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM * DTYPE.itemsize
    sets = [(random_q(num_tokens), random_kv(shape)) for _ in range(max(1, min(8, -(-CACHE_BYTES // nbytes))))]
    out = torch.empty(num_tokens, HEADS * HEAD_DIM, device=DEVICE, dtype=DTYPE)
    calls = [partial(triton_backend.attention_into, q, kv, plan, None, SCALE, out) for q, kv in sets]
    return median_us(calls * (1 if num_tokens > TOKENS // 8 else -(-8 // len(calls))))


def sdpa_us(num_queries: int, num_keys: int, batch: int, kinds: Sequence[SDPBackend]) -> float | None:
    """torch's best of `kinds` over contiguous keys; None if none takes the shape."""
    sizes = ((HEADS, num_queries), (KV_HEADS, num_keys), (KV_HEADS, num_keys))
    sets = [[randn(batch, heads, count, HEAD_DIM) for heads, count in sizes] for _ in range(2)]
    times = []
    for kind in kinds:
        attend: Callable[..., object] = partial(
            functional.scaled_dot_product_attention, is_causal=num_queries > 1, scale=SCALE, enable_gqa=True
        )
        try:
            with sdpa_kernel(kind):
                times.append(median_us([partial(attend, *qkv) for qkv in sets], replays=3))
        except RuntimeError:
            continue
    return min(times, default=None)


def bench_prefill(ceilings: Ceilings) -> Iterator[Row]:
    error = max(check_attention(PREFILL_CHECK, window) for window in (None, 200))
    assert error < MAX_ERROR, error
    kinds = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for name, lengths, shuffled in PREFILL_CASES:
        pairs = sum(n * (context - n) + n * (n + 1) / 2 for n, context in lengths)
        us = attention_us(lengths, shuffled)
        num_queries, context = lengths[0]
        even = num_queries == context and len(set(lengths)) == 1
        torch_us = sdpa_us(num_queries, context, len(lengths), kinds) if even else None
        rate = 4e6 * pairs * HEADS * HEAD_DIM / us
        share = rate / ceilings.matmul_flop_per_s
        yield Row("prefill attention", name, us, f"{rate / 1e12:.0f} TFLOP/s", share, torch_us, error)


def bench_decode(ceilings: Ceilings) -> Iterator[Row]:
    """Against the reading rate: next to nothing is written."""
    del ceilings
    error = max(check_attention(DECODE_CHECK, window) for window in (None, 200))
    assert error < MAX_ERROR, error
    for name, lengths in DECODE_CASES.items():
        us = attention_us([(1, length) for length in lengths], shuffled=True)
        even = len(set(lengths)) == 1
        torch_us = sdpa_us(1, lengths[0], len(lengths), [SDPBackend.FLASH_ATTENTION]) if even else None
        nbytes = sum(lengths) * 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
        yield memory_row("decode attention", name, us, nbytes, READ_BYTES_PER_S, torch_us, error)


def bench_rows(ceilings: Ceilings) -> Iterator[Row]:
    x, residual, weight, bias = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN), randn(HIDDEN)
    gate_up = randn(TOKENS, 2 * INTERMEDIATE)
    gate, up = gate_up.chunk(2, dim=1)
    wide, wide_weight, total = x.double(), weight.double(), (x + residual).double()
    size = (HIDDEN,)
    cases: list[tuple[str, Call, Call, torch.Tensor, int]] = [
        ("RMSNorm", lambda: triton_rows.rms_norm(x, weight, EPS), lambda: functional.rms_norm(x, size, weight, EPS),
         functional.rms_norm(wide, size, wide_weight, EPS), 2 * x.nbytes),
        ("add + RMSNorm", lambda: triton_rows.add_rms_norm(x, residual, weight, EPS),
         lambda: functional.rms_norm(residual.add_(x), size, weight, EPS),
         functional.rms_norm(total, size, wide_weight, EPS), 4 * x.nbytes),
        ("SiLU·mul", lambda: triton_rows.silu_mul(gate_up), lambda: functional.silu(gate) * up,
         functional.silu(gate.float()) * up.float(), gate_up.nbytes * 3 // 2),
        ("LayerNorm", lambda: library_rows.layer_norm(x, weight, bias, EPS),
         lambda: functional.layer_norm(x, size, weight, bias, EPS),
         functional.layer_norm(wide, size, wide_weight, bias.double(), EPS), 2 * x.nbytes),
        ("softmax", lambda: library_rows.softmax(x), lambda: x.softmax(-1), wide.softmax(-1), 2 * x.nbytes),
    ]  # fmt: skip
    flush = CacheFlush(DEVICE)
    for name, call, torch_call, expected, nbytes in cases:
        result = call()
        assert isinstance(result, torch.Tensor)
        error = relative_error(result, expected)
        assert error < MAX_ERROR, (name, error)
        shape = f"{TOKENS} x {gate_up.shape[1] if name == 'SiLU·mul' else HIDDEN}"
        us, torch_us = flush.median_us(call), flush.median_us(torch_call)
        yield memory_row(name, shape, us, nbytes, ceilings.copy_bytes_per_s, torch_us, error)
    yield bench_rope(ceilings, flush)


def bench_rope(ceilings: Ceilings, flush: CacheFlush) -> Row:
    spans, shape = make_spans([(TOKENS, TOKENS)], shuffled=True)
    plan = cuda_backend.plan_batch(spans, [None], shape, DTYPE, DEVICE)
    plain = reference.plan_batch(spans, [None], shape, torch.float64, DEVICE)
    qkv, norm = randn(TOKENS, HEADS + 2 * KV_HEADS, HEAD_DIM), randn(HEAD_DIM)
    cos, sin = randn(TOKENS, 1, HEAD_DIM), randn(TOKENS, 1, HEAD_DIM)
    kv = torch.full_like(random_kv(shape), float("nan"))
    wide_kv, wide_norm = kv.double(), norm.double()
    expected = reference.qk_norm_rope_store(
        qkv.double(), HEADS, cos.double(), sin.double(), wide_norm, wide_norm, EPS, wide_kv, plain
    )
    arguments = (HEADS, cos, sin, norm, norm, EPS, kv)
    out = triton_backend.qk_norm_rope_store(qkv, *arguments, plan)
    error = max(relative_error(out, expected), relative_error(kv, wide_kv))
    assert error < MAX_ERROR, error
    us = flush.median_us(partial(triton_backend.qk_norm_rope_store, qkv, *arguments, plan))
    torch_us = flush.median_us(partial(reference.qk_norm_rope_store, qkv, *arguments, plain))
    nbytes = 2 * (qkv.nbytes + cos.nbytes)
    name = "QK-norm + rotary + KV store"
    return memory_row(name, f"{TOKENS} tokens", us, nbytes, ceilings.copy_bytes_per_s, torch_us, error)


def bench_blocks(ceilings: Ceilings) -> Iterator[Row]:
    num_layers, num_blocks = 32, 300
    kv = randn(num_layers, num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    ids = torch.randperm(num_blocks, device=DEVICE)[: TOKENS // BLOCK_SIZE]
    for first, heads in ((0, KV_HEADS), (2, 4)):
        payload = torch.full_like(randn(num_layers, len(ids), 2, heads, BLOCK_SIZE, HEAD_DIM), float("nan"))
        arguments = (ids, first, heads, payload)
        expected = torch.empty_like(payload)
        digest = blocks_reference.gather_blocks(kv, ids, first, heads, expected)
        assert triton_backend.gather_blocks(kv, *arguments) == digest, "digests differ"
        assert torch.equal(payload, expected)
        target, plain_target = torch.zeros_like(kv), torch.zeros_like(kv)
        blocks_reference.scatter_blocks(plain_target, *arguments)
        assert triton_backend.digest_value(triton_backend.scatter_with_digest(target, *arguments)) == digest
        assert torch.equal(target, plain_target)
        shape = f"{TOKENS} tokens, {num_layers} layers, {heads} of {KV_HEADS} heads"
        for name, move in (
            ("gather + digest", triton_backend.gather_with_digest),
            ("scatter + digest", triton_backend.scatter_with_digest),
        ):
            us = median_us([partial(move, kv, *arguments)])
            yield memory_row(name, shape, us, 2 * payload.nbytes, ceilings.copy_bytes_per_s, None, 0.0)


SUITES: Final = {"prefill": bench_prefill, "decode": bench_decode, "rows": bench_rows, "blocks": bench_blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=SUITES)
    arguments = parser.parse_args()
    ceilings = measure_ceilings(DEVICE)
    copy, matmul = ceilings.copy_bytes_per_s / 1e12, ceilings.matmul_flop_per_s / 1e12
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}: copy {copy:.2f} TB/s, matrix product {matmul:.0f} TFLOP/s")
    print("| kernel | shape | µs | rate | share | torch µs | error |\n|---|---|---|---|---|---|---|")
    rows = []
    for name, suite in SUITES.items():
        for row in suite(ceilings) if arguments.only in (None, name) else ():
            rows.append(row)
            print(row.markdown(), flush=True)
        torch.cuda.empty_cache()
    if arguments.out:
        table = {"device": device, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
