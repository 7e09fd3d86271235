"""Triton kernels that move KV blocks into and out of a flat payload and compute its digest in the same pass.

The payload's order and the digest are those of `common.kernels.blocks_reference`, bit for bit. A run of heads of one
block is contiguous on both sides, so a program copies aligned chunks of 64-bit words. It takes the same chunk of
several digest pieces, which share their word keys.

Kernels that were compiled are kept and launched past Triton's front, which takes longer than all else that a hand-off
asks of the host. Nothing that is copied is read again soon, so it is the first to leave the caches for what a step
reads.
"""
# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from common.kernels.blocks_reference import DIGEST_PIECE_WORDS, HEADER_WORDS

_MAX_CHUNK_WORDS: Final = 2048
_MAX_ALIGN_WORDS: Final = 16
_PIECES: Final = 4  # digest pieces per program
_WORD_BYTES: Final = 8
_GATHER: Final = 0
_SCATTER: Final = 1
_DIGEST_ONLY: Final = 2
_NOTHING: Final = 0  # what the last program to finish does with the digest
_WRITE_HEADER: Final = 1
_CHECK_HEADER: Final = 2
_IF_CHECKED: Final = 3  # a scatter that does nothing unless the check before it found no fault

_compiled: Final[dict[tuple[object, ...], Any]] = {}  # by all that Triton specialises a kernel for


class _Shape(NamedTuple):
    """What `_move_kernel` needs to know, in words; its arguments in their order."""

    num_words: int
    run_words: int
    kv_run_words: int
    first_word: int
    layer_words: int
    num_ids: int


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
    digest = torch.zeros(1, dtype=torch.int64, device=payload.device)
    _launch(payload, payload, digest, _whole(payload.nbytes // _WORD_BYTES), _DIGEST_ONLY, digest)
    return digest


def gather_slot(
    kv: torch.Tensor, words: torch.Tensor, num_ids: int, first_head: int, num_heads: int,
    slot: torch.Tensor, scratch: torch.Tensor,
) -> None:  # fmt: skip
    """Fill the front of a slot, header included, in one launch.

    words: [at least HEADER_WORDS + num_ids] int64, the header with any digest, then the block ids; slot: [at least
    header and payload] uint8, 8-byte aligned; scratch: [SCRATCH_WORDS] int64, zero at first. Launches that share
    scratch must follow each other.
    """
    shape = _shape_of(kv, num_ids, first_head, num_heads)
    assert slot.nbytes >= (HEADER_WORDS + shape.num_words) * _WORD_BYTES
    _launch(kv, slot, words, shape, _GATHER, scratch, _WRITE_HEADER)


def scatter_slot(
    kv: torch.Tensor,
    words: torch.Tensor,
    num_ids: int,
    first_head: int,
    num_heads: int,
    slot: torch.Tensor,
    scratch: torch.Tensor,
    report: torch.Tensor,
) -> None:
    """Check a slot and, if it is what was expected, write its payload to heads of blocks: two launches, no waiting.

    words, slot, scratch: as of `gather_slot`, words being the expected header; report: [REPORT_WORDS] int64, on the
    device or pinned, written: the slot's header, the digest of its payload, and 1 if all is as expected, else 0. No
    block is written then.
    """
    shape = _shape_of(kv, num_ids, first_head, num_heads)
    assert slot.nbytes >= (HEADER_WORDS + shape.num_words) * _WORD_BYTES
    _launch(kv, slot, words, _whole(shape.num_words), _DIGEST_ONLY, scratch, _CHECK_HEADER, report)
    _launch(kv, slot, words, shape, _SCATTER, scratch, _IF_CHECKED)


def digest_value(digest: torch.Tensor) -> int:
    """The digest as the number that travels: waits for the device. digest: [1] int64."""
    return int(digest.item()) & ((1 << 64) - 1)


def _move(
    kv: torch.Tensor, block_ids: torch.Tensor, first_head: int, num_heads: int, payload: torch.Tensor, mode: int
) -> torch.Tensor:
    shape = _shape_of(kv, block_ids.numel(), first_head, num_heads)
    assert payload.is_contiguous()
    assert payload.nbytes == shape.num_words * _WORD_BYTES
    digest = torch.zeros(1, dtype=torch.int64, device=payload.device)
    _launch(kv, payload, block_ids, shape, mode, digest)
    return digest


def _shape_of(kv: torch.Tensor, num_ids: int, first_head: int, num_heads: int) -> _Shape:
    num_layers, num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    assert kv.is_contiguous()
    head_words = block_size * head_dim * kv.itemsize // _WORD_BYTES
    layer_words = num_blocks * 2 * num_kv_heads * head_words
    run_words = num_heads * head_words
    num_words = num_layers * 2 * run_words * num_ids
    return _Shape(num_words, run_words, num_kv_heads * head_words, first_head * head_words, layer_words, num_ids)


def _whole(num_words: int) -> _Shape:
    """Of a payload alone."""
    return _Shape(num_words, num_words, 0, 0, 0, 1)


def _launch(
    kv: torch.Tensor,
    slot: torch.Tensor,
    words: torch.Tensor,
    shape: _Shape,
    mode: int,
    scratch: torch.Tensor,
    end: int = _NOTHING,
    report: torch.Tensor | None = None,
) -> None:
    """Headers are in front of the payload in `slot` and of the block ids in `words` unless `end` is _NOTHING."""
    if shape.num_words == 0:
        return
    # A power of two that divides the run, so that a chunk's addresses are contiguous on both sides.
    chunk = _MAX_CHUNK_WORDS if mode == _DIGEST_ONLY else min(_MAX_CHUNK_WORDS, shape.run_words & -shape.run_words)
    sizes = shape.run_words | shape.kv_run_words | shape.first_word | shape.layer_words
    # A power of two that divides where a chunk begins in the KV cache.
    align = 1 if mode == _DIGEST_ONLY else min(_MAX_ALIGN_WORDS, sizes & -sizes)
    num_groups = -(-shape.num_words // (DIGEST_PIECE_WORDS * _PIECES))
    grid = (DIGEST_PIECE_WORDS // chunk, num_groups, 1)
    header = 0 if end == _NOTHING else HEADER_WORDS
    constants = (mode, end, header, chunk, align, _PIECES, DIGEST_PIECE_WORDS)
    arguments = (kv, slot, words, scratch, report, *shape, *constants)
    variant = _variant(kv, slot, words, shape, constants)
    compiled = _compiled.get(variant)
    if compiled is not None:
        compiled[grid](*arguments)
        return
    compiled = _move_kernel[grid](*arguments, num_warps=8 if chunk >= 2048 else 4)
    if kv.is_cuda and compiled is not None:  # nothing is compiled for an interpreter
        _compiled[variant] = compiled


def _variant(
    kv: torch.Tensor, slot: torch.Tensor, words: torch.Tensor, shape: _Shape, constants: tuple[int, ...]
) -> tuple[object, ...]:
    """Launches for which this is the same run the same compiled kernel. Constants say whether there is a report."""
    num_words, run_words, kv_run_words, first_word, layer_words, _ = shape
    return (
        kv.device, constants, kv.dtype, slot.dtype, words.dtype, kv.data_ptr() % 16 == 0, slot.data_ptr() % 16 == 0,
        _kind(num_words), _kind(run_words), _kind(kv_run_words), _kind(first_word), _kind(layer_words),
    )  # fmt: skip


def _kind(number: int) -> int:
    """What Triton tells apart of an argument that is not negative: 1, multiples of 16, and 64 bits."""
    return 1 if number == 1 else (2 if number % 16 == 0 else 0) + (4 if number >> 31 else 0)


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


# Compiling another variant would hold up a hand-off.
@triton.jit(do_not_specialize=["num_ids"], do_not_specialize_on_alignment=["words_ptr", "scratch_ptr", "report_ptr"])
def _move_kernel(
    kv_ptr, slot_ptr, words_ptr, scratch_ptr, report_ptr, num_words, run_words, kv_run_words, first_word, layer_words,
    num_ids,
    MODE: tl.constexpr, END: tl.constexpr, HEADER: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    PIECES: tl.constexpr, PIECE_WORDS: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks of a piece, groups of PIECES pieces). A chunk lies in one run, so its addresses are contiguous."""
    if END == 3:  # noqa: SIM102 - a constant decides whether there is a load at all
        if tl.load(scratch_ptr + 2) == 0:
            return
    kv_words_ptr = kv_ptr.to(tl.pointer_type(tl.int64))
    payload_ptr = slot_ptr.to(tl.pointer_type(tl.int64)) + HEADER
    within = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK).to(tl.int64)
    key = _mix(within) | 1
    digest = tl.zeros((), dtype=tl.int64)
    for number in tl.static_range(PIECES):
        piece = tl.program_id(1).to(tl.int64) * PIECES + number
        first = piece * PIECE_WORDS + tl.program_id(0) * CHUNK
        if first < num_words:
            run = first // run_words  # counts (layer, block, K or V)
            words = tl.arange(0, CHUNK)
            at = payload_ptr + first + words
            if MODE == 2:
                word = tl.load(at, first + words < num_words, other=0, eviction_policy="evict_first")
            else:
                entry = run // 2
                block = tl.load(words_ptr + HEADER + entry % num_ids)
                kv_at = (entry // num_ids) * layer_words + (block * 2 + run % 2) * kv_run_words
                kv_at = tl.multiple_of(kv_at + first_word + first % run_words, ALIGN)
                if MODE == 0:
                    word = tl.load(kv_words_ptr + kv_at + words, eviction_policy="evict_first")
                    tl.store(at, word, eviction_policy="evict_first")
                else:
                    word = tl.load(at, eviction_policy="evict_first")
                    tl.store(kv_words_ptr + kv_at + words, word, eviction_policy="evict_first")
            if END != 3:
                folded = word ^ _shift_down(word, 32)
                digest += tl.sum(folded * key) * (_mix(piece) | 1)
    if END != 3:
        tl.atomic_add(scratch_ptr, digest, sem="relaxed")
    if (END == 1) | (END == 2):
        _end(scratch_ptr, payload_ptr - HEADER, words_ptr, report_ptr, END)


@triton.jit
def _end(scratch_ptr, header_ptr, expected_ptr, report_ptr, END: tl.constexpr):
    """The last program of a launch has the digest of all; it and the count of programs are zeroed for the next."""
    tl.debug_barrier()
    num_programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(scratch_ptr + 1, 1, sem="acq_rel") == num_programs - 1:
        total = tl.atomic_xchg(scratch_ptr, 0)
        tl.store(scratch_ptr + 1, 0)
        word = tl.arange(0, 8)
        expected = tl.where(word == 4, total, tl.load(expected_ptr + word))
        if END == 1:
            tl.store(header_ptr + word, expected)
        else:
            found = tl.load(header_ptr + word)
            is_right = (tl.sum((found != expected).to(tl.int64)) == 0).to(tl.int64)
            tl.store(scratch_ptr + 2, is_right)
            tl.store(report_ptr + word, found)
            tl.store(report_ptr + 8, total)
            tl.store(report_ptr + 9, is_right)
