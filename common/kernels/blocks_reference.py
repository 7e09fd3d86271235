"""Moving KV blocks into and out of a flat payload, and the payload's digest, in plain torch.

    payload: [num_layers, num_blocks, 2, num_heads, block_size, head_dim], contiguous
    digest:  Σ_i key(i) · fold(word_i)  mod 2^64      word_i: little-endian 64-bit words of the payload
             fold(w) = w ^ (w >>> 32)                 brings the high half down, where multiplication spreads it
             key(64-bit, odd) = mix(j) · mix(k) | 1   i = k · DIGEST_PIECE_WORDS + j, mix = the finaliser of splitmix64

`fold` and the product with an odd key are bijections, so any change that stays within one word is always detected;
words that move get another key. A sum is order free, hence a kernel can compute it in parallel while it copies.
The keys are not secret: this guards against accidents, not against forgery.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

DIGEST_PIECE_WORDS: Final = 1 << 14  # 128 KiB: a piece, its fold and the keys stay in a core's cache
# Of kernels that write and check slots on the device (`triton_blocks`), in words of 64 bits.
HEADER_WORDS: Final = 8
REPORT_WORDS: Final = HEADER_WORDS + 2  # the slot's header, the digest of its payload, whether all is as expected
SCRATCH_WORDS: Final = 3  # digest so far, programs that are done, whether the last check found no fault
_WORD_BYTES: Final = 8
_MASK: Final = (1 << 64) - 1
_LOW_HALF: Final = 0xFFFF_FFFF


def gather_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor
) -> int:
    """Copy heads of blocks into `payload` and return its digest.

    kv: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]; block_ids: [n] int64 on kv's device;
    payload: [num_layers, n, 2, num_heads, block_size, head_dim], contiguous, any memory of kv's device.
    """
    index = _row_index(kv, block_ids, first_head, num_heads)
    row = kv.shape[4] * kv.shape[5]
    for layer, part in zip(kv, payload, strict=True):
        torch.index_select(layer.view(-1, row), 0, index, out=part.view(-1, row))
    return payload_digest(payload)


def scatter_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor
) -> None:
    """The inverse of `gather_blocks`; the digest must have been checked. Other heads and blocks stay untouched."""
    index = _row_index(kv, block_ids, first_head, num_heads)
    row = kv.shape[4] * kv.shape[5]
    for layer, part in zip(kv, payload, strict=True):
        layer.view(-1, row).index_copy_(0, index, part.view(-1, row))


def payload_digest(payload: torch.Tensor) -> int:
    """Digest of a contiguous tensor whose size is a multiple of 8 bytes; in [0, 2^64)."""
    words = payload.view(-1).view(torch.int64)
    keys = _piece_keys().to(words.device)
    digest = 0
    folded = torch.empty(min(DIGEST_PIECE_WORDS, words.numel()), dtype=torch.int64, device=words.device)
    for number, piece in enumerate(torch.split(words, DIGEST_PIECE_WORDS)):
        fold = folded[: piece.numel()]
        torch.bitwise_right_shift(piece, 32, out=fold)
        fold.bitwise_and_(_LOW_HALF).bitwise_xor_(piece).mul_(keys[: piece.numel()])
        digest += int(fold.sum()) * (_mix(number) | 1)
    return digest & _MASK


def _row_index(kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int) -> torch.Tensor:
    """[n * 2 * num_heads] int64 into a layer seen as rows of one head's block."""
    num_kv_heads = kv.shape[3]
    heads = torch.arange(first_head, first_head + num_heads, device=kv.device)
    head_rows = torch.cat((heads, heads + num_kv_heads))
    return (block_ids.unsqueeze(1) * (2 * num_kv_heads) + head_rows).flatten()


@cache
def _piece_keys() -> torch.Tensor:
    """[DIGEST_PIECE_WORDS] int64, odd."""
    keys = [_mix(index) | 1 for index in range(DIGEST_PIECE_WORDS)]
    return torch.tensor([key - (key >> 63 << 64) for key in keys], dtype=torch.int64)


def _mix(index: int) -> int:
    """A 64-bit number that looks random: splitmix64 (Steele, Lea and Flood, 2014) at `index`."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
