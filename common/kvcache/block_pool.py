"""Ownership of KV blocks by number: each is free, cached or held, and the three add up to the total.

             alloc                    decref to 0, not published
    free ────────────▶ held ────────────────────────────────────▶ free
                       ▲  │  decref to 0, published
                incref │  ▼
                       cached ──── evict ────▶ free

Knows neither tokens, hashes nor sequences: who may publish or evict a block is decided by the caller.
"""

from __future__ import annotations

from common.errors import InternalError, InvalidArgument


class BlockPool:
    """Blocks numbered from 0. Every misuse (a double free, use of a free block) is an `InternalError`."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise InvalidArgument("num_blocks", num_blocks, "must be at least 1")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is reused first
        self._refcounts = [0] * num_blocks
        self._published = bytearray(num_blocks)
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Published blocks that nobody holds: they keep their content until `evict`."""
        return self._num_cached

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - self._num_cached

    def refcount(self, block_id: int) -> int:
        return self._refcounts[block_id]

    def is_published(self, block_id: int) -> bool:
        return bool(self._published[block_id])

    def alloc(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` free blocks, each with one reference; None and no change if there are fewer."""
        if num_blocks > len(self._free):
            return None
        split = len(self._free) - num_blocks
        taken = self._free[split:]
        del self._free[split:]
        taken.reverse()
        for block_id in taken:
            self._refcounts[block_id] = 1
        return taken

    def incref(self, block_id: int) -> bool:
        """Add a reference to a held or cached block. True if it was cached until now."""
        count = self._refcounts[block_id]
        if count == 0:
            if not self._published[block_id]:
                raise InternalError(f"incref of free block {block_id}")
            self._num_cached -= 1
        self._refcounts[block_id] = count + 1
        return count == 0

    def decref(self, block_id: int) -> bool:
        """Drop a reference. After the last, a published block is cached (returns True), another free."""
        count = self._refcounts[block_id] - 1
        if count < 0:
            raise InternalError(f"decref of block {block_id}, which nobody holds")
        self._refcounts[block_id] = count
        if count > 0:
            return False
        if self._published[block_id]:
            self._num_cached += 1
            return True
        self._free.append(block_id)
        return False

    def publish(self, block_id: int) -> None:
        """From now on the held block outlives its last reference, as a cached block."""
        if self._refcounts[block_id] == 0 or self._published[block_id]:
            raise InternalError(f"publish of block {block_id}, which is not held or already published")
        self._published[block_id] = 1

    def evict(self, block_id: int) -> None:
        """Turn a cached block into a free one."""
        if self._refcounts[block_id] != 0 or not self._published[block_id]:
            raise InternalError(f"evict of block {block_id}, which is not cached")
        self._published[block_id] = 0
        self._num_cached -= 1
        self._free.append(block_id)

    def check_integrity(self) -> None:
        """Recount everything from the per-block state; O(num_blocks)."""
        blocks = range(self.num_blocks)
        free = {b for b in blocks if self._refcounts[b] == 0 and not self._published[b]}
        num_cached = sum(1 for b in blocks if self._refcounts[b] == 0 and self._published[b])
        num_held = sum(1 for b in blocks if self._refcounts[b] > 0)
        if min(self._refcounts) < 0:
            raise InternalError("a block has a negative reference count")
        if len(self._free) != len(free) or set(self._free) != free:
            raise InternalError("the free list differs from the blocks that nobody owns")
        if (num_cached, num_held) != (self.num_cached, self.num_held):
            raise InternalError(f"counted {num_cached} cached and {num_held} held blocks, not {self!r}")

    def __repr__(self) -> str:
        return f"BlockPool(free={self.num_free}, cached={self.num_cached}, held={self.num_held})"
