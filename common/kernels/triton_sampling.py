"""Triton kernel from logits to tokens, a program per row: argmax, or temperature, top-k, top-p, min-p and a draw.

    row_state: [rows, 8] int32, floats by their bits; a batch member's row is looked up and its last token replaced
               last token | temperature, 0: greedy | top-k, 0: off | top-p | min-p | seed, low and high | choice

Follows `common.sampling.sampler` in meaning: the cutoff keeps ties, the number drawn is Philox's for (seed, choice,
output index), the token is the inverse of the running sum in id order. Cutoffs are found by bisection over the bits of
a logit instead of a sort. Penalties, bias and logprobs are not for this kernel.
"""

# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, attr-defined"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

NUM_STATE_FIELDS: Final = 8
INVALID_TOKEN: Final = -1  # no token can be chosen: NaN or infinity
_CHUNK: Final = 8192
_ZERO_LOW_BITS: Final = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # of the same number as a float32


def draw_tokens(
    logits: torch.Tensor,
    vocab_size: int,
    rows: torch.Tensor,
    output_indices: torch.Tensor,
    row_state: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """logits: [n, at least vocab_size], columns contiguous; rows, output_indices: [n] int32.

    Written: token_ids: [n] int32, `INVALID_TOKEN` where a row has none; the rows' last tokens, 0 in that case.
    """
    chunk = min(_CHUNK, triton.next_power_of_2(vocab_size))
    _draw_kernel[(rows.shape[0],)](
        logits, rows, output_indices, row_state, token_ids, logits.stride(0), vocab_size,
        NUM_STATE_FIELDS=row_state.shape[1], CHUNK=chunk, SHIFT=_ZERO_LOW_BITS[logits.dtype],
        num_warps=max(1, min(16, chunk // 512)),
    )  # fmt: skip


@triton.jit
def _logits(logits_ptr, ids, vocab_size):
    return tl.load(logits_ptr + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(x, SHIFT: tl.constexpr):
    """An int32 that grows with the float32; its low bits, which are the same for all, are dropped."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def _sum_from(
    logits_ptr, vocab_size, low, floor, top, temperature, COUNT: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr
):
    """Weight, or number, of the tokens whose order is at least both `low` and `floor`."""
    total = 0.0
    total = total.to(tl.float64)
    for start in range(0, vocab_size, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        x = _logits(logits_ptr, ids, vocab_size)
        order = _order(x, SHIFT)
        kept = (order >= low) & (order >= floor) & (ids < vocab_size)
        if COUNT:
            total += tl.sum(kept.to(tl.int32)).to(tl.float64)
        else:
            weight = tl.where(kept, tl.exp((x - top) / temperature), 0.0)
            total += tl.sum(weight.to(tl.float64))
    return total


@triton.jit
def _largest_reaching(
    logits_ptr, vocab_size, goal, floor, top, temperature, COUNT: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr
):
    """The largest order from which on the tokens above `floor` weigh, or number, at least `goal`."""
    high = _order(top, SHIFT)
    low = tl.full((), -(1 << (31 - SHIFT)), tl.int32)
    while low < high:
        # Half of the sum, rounded up, without overflow.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reached = _sum_from(logits_ptr, vocab_size, middle, floor, top, temperature, COUNT, CHUNK, SHIFT) >= goal
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def _weights(logits_ptr, ids, vocab_size, floor, min_p, top, temperature, SHIFT: tl.constexpr):
    """float64, 0 where the token is cut off."""
    x = _logits(logits_ptr, ids, vocab_size)
    weight = tl.exp((x - top) / temperature)
    kept = (ids < vocab_size) & (_order(x, SHIFT) >= floor) & (weight >= min_p)
    return tl.where(kept, weight, 0.0).to(tl.float64)


@triton.jit
def _uniform(state_ptr, output_index):
    """`common.sampling.philox.uniform`, to the bit."""
    low = tl.load(state_ptr + 5).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(state_ptr + 6).to(tl.uint32, bitcast=True).to(tl.uint64)
    position = output_index.to(tl.uint32)
    choice = tl.load(state_ptr + 7).to(tl.uint32)
    zero = position * 0
    w0, w1, _, _ = tl.philox((high << 32) | low, position, zero, choice, zero)
    bits = ((w0 >> 5).to(tl.int64) << 26) | (w1 >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _drawn(
    logits_ptr, state_ptr, output_index, vocab_size, temperature, top, best_id, CHUNK: tl.constexpr, SHIFT: tl.constexpr
):
    """The token that the row's uniform falls on."""
    top_k = tl.load(state_ptr + 2)
    top_p = tl.load(state_ptr + 3).to(tl.float32, bitcast=True).to(tl.float64)
    min_p = tl.load(state_ptr + 4).to(tl.float32, bitcast=True)
    floor = tl.full((), -(1 << (31 - SHIFT)), tl.int32)
    if (top_k > 0) & (top_k < vocab_size):
        floor = _largest_reaching(logits_ptr, vocab_size, top_k.to(tl.float64), floor, top, 1.0, True, CHUNK, SHIFT)
    if top_p < 1.0:
        goal = top_p * _sum_from(logits_ptr, vocab_size, floor, floor, top, temperature, False, CHUNK, SHIFT)
        nucleus = _largest_reaching(logits_ptr, vocab_size, goal, floor, top, temperature, False, CHUNK, SHIFT)
        floor = tl.maximum(floor, nucleus)
    total = 0.0
    total = total.to(tl.float64)
    for start in range(0, vocab_size, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        total += tl.sum(_weights(logits_ptr, ids, vocab_size, floor, min_p, top, temperature, SHIFT))
    target = _uniform(state_ptr, output_index) * total
    before = total * 0.0
    first = 0
    running = before
    for start in range(0, vocab_size, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        own = tl.sum(_weights(logits_ptr, ids, vocab_size, floor, min_p, top, temperature, SHIFT))
        # So far every chunk ends at or before the target. Not an `if`: the compiler tells what a loop changes by the
        # values of a first look, in which `running` is `before`, and would leave `before` as it was.
        first = tl.where(running <= target, start, first)
        before = tl.where(running <= target, running, before)
        running += own
    ids = first + tl.arange(0, CHUNK)
    weight = _weights(logits_ptr, ids, vocab_size, floor, min_p, top, temperature, SHIFT)
    reached = (before + tl.cumsum(weight, 0) > target) & (weight > 0.0)
    token = tl.min(tl.where(reached, ids, vocab_size), 0)
    # Rounding may put the target at the very end of the sum: then it is the last token with weight, or the likeliest.
    last = tl.max(tl.where(weight > 0.0, ids, -1), 0)
    return tl.where(token < vocab_size, token, tl.where(last >= 0, last, best_id))


@triton.jit
def _draw_kernel(
    logits_ptr, rows_ptr, output_indices_ptr, state_ptr, token_ids_ptr, stride, vocab_size,
    NUM_STATE_FIELDS: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Grid: (rows of the batch,)."""
    index = tl.program_id(0)
    own = state_ptr + tl.load(rows_ptr + index) * NUM_STATE_FIELDS
    logits = logits_ptr + index.to(tl.int64) * stride
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    best_ids = tl.zeros([CHUNK], tl.int32)
    is_nan = tl.zeros([CHUNK], tl.int32)
    for start in tl.range(0, vocab_size, CHUNK, loop_unroll_factor=4):
        ids = start + tl.arange(0, CHUNK)
        x = _logits(logits, ids, vocab_size)
        is_nan |= (x != x).to(tl.int32)
        higher = x > best
        best = tl.where(higher, x, best)
        best_ids = tl.where(higher, ids, best_ids)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, best_ids, vocab_size), 0)
    valid = (tl.max(is_nan, 0) == 0) & (tl.abs(top) < float("inf"))
    temperature = tl.load(own + 1).to(tl.float32, bitcast=True)
    if valid & (temperature > 0.0):
        token = _drawn(
            logits, own, tl.load(output_indices_ptr + index), vocab_size, temperature, top, token, CHUNK, SHIFT
        )
    tl.store(token_ids_ptr + index, tl.where(valid, token, -1))
    tl.store(own, tl.where(valid, token, 0))
