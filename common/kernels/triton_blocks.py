"""Triton kernels that move KV blocks into and out of a flat payload and compute its digest in the same pass.

The payload's order and the digest are those of `common.kernels.blocks_reference`, bit for bit. A run of heads of one
block is contiguous on both sides, so a program copies aligned chunks of 64-bit words. It takes the same chunk of
several digest pieces, which share their word keys.
"""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from common.kernels.blocks_reference import DIGEST_PIECE_WORDS

_MAX_CHUNK_WORDS: Final = 2048
_PIECES: Final = 4  # digest pieces per program
_WORD_BYTES: Final = 8
_GATHER: Final = 0
_SCATTER: Final = 1
_DIGEST_ONLY: Final = 2
_NOTHING: Final = 0  # what the last program to finish does with the digest
_WRITE_HEADER: Final = 1
_CHECK_HEADER: Final = 2
_IF_CHECKED: Final = 3  # a scatter that does nothing unless the check before it found no fault
HEADER_WORDS: Final = 8
REPORT_WORDS: Final = HEADER_WORDS + 2


def gather_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor
) -> int:
    """`gather_with_digest`, waiting for the digest: in [0, 2^64)."""
    return digest_value(gather_with_digest(kv, block_ids, first_head, num_heads, payload))


def scatter_blocks(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor
) -> None:
    """The inverse of `gather_blocks`. Other heads and blocks stay untouched."""
    _move(kv, block_ids, first_head, num_heads, payload, _SCATTER)


def payload_digest(payload: torch.Tensor) -> int:
    """Digest of a contiguous tensor whose size is a multiple of 8 bytes; in [0, 2^64)."""
    return digest_value(digest_on_device(payload))


def gather_with_digest(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor
) -> torch.Tensor:
    """Copy heads of blocks into `payload`; returns its digest, [1] int64 on the device, without waiting.

    kv: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim], contiguous; block_ids: [n] int64;
    payload: [num_layers, n, 2, num_heads, block_size, head_dim], contiguous.
    """
    return _move(kv, block_ids, first_head, num_heads, payload, _GATHER)


def scatter_with_digest(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor
) -> torch.Tensor:
    """Copy `payload` into heads of blocks; returns the digest of what was copied, [1] int64, without waiting.

    The blocks must not be in use before the caller has compared the digest.
    """
    return _move(kv, block_ids, first_head, num_heads, payload, _SCATTER)


def digest_on_device(payload: torch.Tensor) -> torch.Tensor:
    """`payload_digest` as [1] int64 on the device, without waiting."""
    words = payload.view(-1).view(torch.int64)
    digest = torch.zeros(1, dtype=torch.int64, device=words.device)
    _launch(words, words, words, (words.numel(), 0, 0, 0, 1), _DIGEST_ONLY, digest)
    return digest


def gather_slot(
    kv: torch.Tensor, words: torch.Tensor, first_head: int, num_heads: int, slot: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Fill a slot, header included, in one launch.

    words: [HEADER_WORDS + n] int64, the header with any digest, then the block ids; slot: [HEADER_WORDS + payload]
    int64; scratch: [2] int64, zero before and after. Launches that share scratch must follow each other.
    """
    payload = slot[HEADER_WORDS:]
    shape = _shape_of(kv, words.numel() - HEADER_WORDS, first_head, num_heads, payload)
    ids = words[HEADER_WORDS:]
    _launch(kv.view(-1).view(torch.int64), payload, ids, shape, _GATHER, scratch, _WRITE_HEADER, slot, words)


def scatter_slot(
    kv: torch.Tensor,
    words: torch.Tensor,
    first_head: int,
    num_heads: int,
    slot: torch.Tensor,
    scratch: torch.Tensor,
    report: torch.Tensor,
) -> None:
    """Check a slot and, if it is what was expected, write its payload to heads of blocks: two launches, no waiting.

    words, slot, scratch: as of `gather_slot`, words being the expected header; report: [REPORT_WORDS] int64, written:
    the slot's header, the digest of its payload, and 1 if all is as expected, else 0. No block is written then.
    """
    payload = slot[HEADER_WORDS:]
    shape = _shape_of(kv, words.numel() - HEADER_WORDS, first_head, num_heads, payload)
    ids = words[HEADER_WORDS:]
    whole = (payload.numel(), 0, 0, 0, 1)
    _launch(payload, payload, ids, whole, _DIGEST_ONLY, scratch, _CHECK_HEADER, slot, words, report)
    kv_words = kv.view(-1).view(torch.int64)
    _launch(kv_words, payload, ids, shape, _SCATTER, scratch, _IF_CHECKED, slot, words, report)


def digest_value(digest: torch.Tensor) -> int:
    """The digest as the number that travels: waits for the device. digest: [1] int64."""
    return int(digest.item()) & ((1 << 64) - 1)


def _move(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor, mode: int
) -> torch.Tensor:
    shape = _shape_of(kv, block_ids.numel(), first_head, num_heads, payload)
    assert payload.is_contiguous()
    digest = torch.zeros(1, dtype=torch.int64, device=payload.device)
    _launch(kv.view(-1).view(torch.int64), payload.view(-1).view(torch.int64), block_ids, shape, mode, digest)
    return digest


def _shape_of(
    kv: torch.Tensor, num_ids: int, first_head: int, num_heads: int, payload: torch.Tensor
) -> tuple[int, int, int, int, int]:
    """What `_move_kernel` needs to know, in words."""
    num_layers, num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    head_words = block_size * head_dim * kv.element_size() // _WORD_BYTES
    layer_words = num_blocks * 2 * num_kv_heads * head_words
    run_words = num_heads * head_words
    assert kv.is_contiguous()
    assert payload.nbytes == num_layers * 2 * run_words * num_ids * _WORD_BYTES
    return run_words, num_kv_heads * head_words, first_head * head_words, layer_words, num_ids


def _launch(
    kv_words: torch.Tensor,
    payload_words: torch.Tensor,
    block_ids: torch.Tensor,
    shape: tuple[int, int, int, int, int],
    mode: int,
    digest: torch.Tensor,
    end: int = _NOTHING,
    header: torch.Tensor | None = None,
    expected: torch.Tensor | None = None,
    report: torch.Tensor | None = None,
) -> None:
    run_words, kv_run_words, first_word, layer_words, num_ids = shape
    if payload_words.numel() == 0:
        return
    # A power of two that divides the run, so that a chunk's addresses are contiguous on both sides.
    chunk = _MAX_CHUNK_WORDS if mode == _DIGEST_ONLY else min(_MAX_CHUNK_WORDS, run_words & -run_words)
    num_pieces = triton.cdiv(payload_words.numel(), DIGEST_PIECE_WORDS)
    grid = (DIGEST_PIECE_WORDS // chunk, triton.cdiv(num_pieces, _PIECES))
    _move_kernel[grid](
        kv_words, payload_words, block_ids, digest, payload_words.numel(), run_words, kv_run_words, first_word,
        layer_words, num_ids, header, expected, report,
        MODE=mode, END=end, CHUNK=chunk, PIECES=_PIECES, PIECE_WORDS=DIGEST_PIECE_WORDS,
        num_warps=8 if chunk >= 2048 else 4,
    )  # fmt: skip


@triton.jit
def _mix(index):
    """splitmix64 at `index` (int64, any shape): the wrapped signed product has the bits of the unsigned one."""
    z = (index + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    z = (z ^ _shift_down(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift_down(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift_down(z, 31)


@triton.jit
def _shift_down(word, BITS: tl.constexpr):
    """Logical shift right of int64."""
    return (word >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit(do_not_specialize=["num_ids"])  # compiling another variant would hold up a hand-off
def _move_kernel(
    kv_ptr, payload_ptr, block_ids_ptr, digest_ptr, num_words, run_words, kv_run_words, first_word, layer_words,
    num_ids, header_ptr, expected_ptr, report_ptr,
    MODE: tl.constexpr, END: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr, PIECE_WORDS: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks of a piece, groups of PIECES pieces). A chunk lies in one run, so its addresses are contiguous."""
    if END == 3:  # noqa: SIM102 - a constant decides whether there is a load at all
        if tl.load(report_ptr + 9) == 0:
            return
    within = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK).to(tl.int64)
    key = _mix(within) | 1
    digest = tl.zeros((), dtype=tl.int64)
    for number in tl.static_range(PIECES):
        piece = tl.program_id(1).to(tl.int64) * PIECES + number
        first = piece * PIECE_WORDS + tl.program_id(0) * CHUNK
        if first < num_words:
            run = first // run_words  # counts (layer, block, K or V)
            words = tl.arange(0, CHUNK)
            if MODE == 2:
                word = tl.load(payload_ptr + first + words, first + words < num_words, other=0)
            else:
                entry = run // 2
                block = tl.load(block_ids_ptr + entry % num_ids)
                kv_at = (entry // num_ids) * layer_words + (block * 2 + run % 2) * kv_run_words
                kv_at += first_word + first % run_words
                if MODE == 0:
                    word = tl.load(kv_ptr + kv_at + words)
                    tl.store(payload_ptr + first + words, word)
                else:
                    word = tl.load(payload_ptr + first + words)
                    tl.store(kv_ptr + kv_at + words, word)
            if END != 3:
                folded = word ^ _shift_down(word, 32)
                digest += tl.sum(folded * key) * (_mix(piece) | 1)
    if END != 3:
        tl.atomic_add(digest_ptr, digest, sem="relaxed")
    if (END == 1) | (END == 2):
        _end(digest_ptr, header_ptr, expected_ptr, report_ptr, END)


@triton.jit
def _end(digest_ptr, header_ptr, expected_ptr, report_ptr, END: tl.constexpr):
    """The last program of a launch has the digest of all: [digest, programs that are done], zeroed for the next."""
    tl.debug_barrier()
    num_programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(digest_ptr + 1, 1, sem="acq_rel") == num_programs - 1:
        total = tl.atomic_xchg(digest_ptr, 0)
        tl.store(digest_ptr + 1, 0)
        word = tl.arange(0, 8)
        expected = tl.where(word == 4, total, tl.load(expected_ptr + word))
        if END == 1:
            tl.store(header_ptr + word, expected)
        else:
            found = tl.load(header_ptr + word)
            tl.store(report_ptr + word, found)
            tl.store(report_ptr + 8, total)
            num_wrong = tl.sum((found != expected).to(tl.int64))
            tl.store(report_ptr + 9, (num_wrong == 0).to(tl.int64))
