"""The block tables of one worker's sequences, with prefix reuse: what a front asks before it plans a step.

    a block table   0              num_cached             num_committed            len(block_ids)
                    │ from the cache: │ ours and final: published │ ours: being written or │
                    │ read only       │ or a private copy         │ not valid yet          │

Plain book-keeping over ints and hashes: knows no tensors, no devices and no requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import InternalError, InvalidArgument
from common.kvcache.block_pool import BlockPool
from common.kvcache.prefix_trie import PrefixTrie


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """One sequence's block table. Read it freely; only the manager that admitted it changes it."""

    block_ids: list[int]
    num_cached_blocks: int  # leading blocks that came from the prefix cache
    num_committed_blocks: int  # leading blocks whose content is valid and offered to the cache
    last_committed_hash: bytes | None
    num_lookup_blocks: int  # blocks asked for at admission and not counted in the statistics yet
    anchors: list[int] = field(default_factory=list)  # published twins of our private copies
    released: bool = False


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """Block counts now, and totals since the start."""

    num_free: int
    num_cached: int
    num_held: int
    num_lookup_tokens: int  # prompt tokens in full blocks of sequences that got their blocks
    num_hit_tokens: int  # of these, tokens found in the prefix cache
    num_evicted_blocks: int


class KVCacheManager:
    """Hands out blocks, finds cached prefixes, and evicts cached blocks when free ones run out.

    When two sequences compute the same prefix at once, the first to commit publishes its blocks. The second
    keeps its copies private (its kernels may be using them, so its table must not change) and also takes a
    reference, an *anchor*, on each published twin. So a holder of a published block holds all its
    ancestors, and every cached block can be evicted: `num_available` is exact.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_cache: bool = True,
    ) -> None:
        if block_size < 1:
            raise InvalidArgument("block_size", block_size, "must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._pool = BlockPool(num_blocks)
        self._trie = PrefixTrie()
        self._sequences: set[SequenceBlocks] = set()
        self._num_lookup_blocks = 0
        self._num_hit_blocks = 0
        self._num_evicted_blocks = 0

    @property
    def num_available(self) -> int:
        """Blocks that `extend` can hand out now: the free ones and, after eviction, the cached ones."""
        return self._pool.num_free + self._pool.num_cached

    def stats(self) -> KVCacheStats:
        return KVCacheStats(
            num_free=self._pool.num_free,
            num_cached=self._pool.num_cached,
            num_held=self._pool.num_held,
            num_lookup_tokens=self._num_lookup_blocks * self.block_size,
            num_hit_tokens=self._num_hit_blocks * self.block_size,
            num_evicted_blocks=self._num_evicted_blocks,
        )

    def match_prefix(self, hashes: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached. This does not modify the cache, nor keep them there."""
        return self._trie.match(hashes)

    def admit(self, hashes: Sequence[bytes], max_cached_blocks: int) -> SequenceBlocks:
        """Open a block table that starts with the cached leading blocks, held until `release`.

        A prompt's last token must be computed even if all of it is cached: pass
        `max_cached_blocks=(num_tokens - 1) // block_size`.
        """
        num_cached = min(self._trie.match(hashes), max(max_cached_blocks, 0))
        block_ids = [self._hold_published(block_hash) for block_hash in hashes[:num_cached]]
        last_hash = hashes[num_cached - 1] if num_cached else None
        seq = SequenceBlocks(block_ids, num_cached, num_cached, last_hash, len(hashes))
        self._sequences.add(seq)
        return seq

    def extend(self, seq: SequenceBlocks, num_blocks_total: int) -> bool:
        """Grow the table to `num_blocks_total` blocks, evicting cached ones as needed.

        False and no change at all if there are not enough. A table that is long enough stays as it is.
        """
        self._require_live(seq)
        num_new = num_blocks_total - len(seq.block_ids)
        if num_new > self.num_available:
            return False
        if num_new > 0:
            self._evict(num_new - self._pool.num_free)
            taken = self._pool.alloc(num_new)
            assert taken is not None, "free + cached was enough, so eviction must have freed enough"
            seq.block_ids += taken
        self._count_lookup(seq)
        return True

    def commit(self, seq: SequenceBlocks, hashes: Sequence[bytes], num_full_blocks: int) -> None:
        """Offer the first `num_full_blocks` blocks, whose content is final and valid, to the prefix cache.

        `hashes` are those of the sequence from its first block on, the same in every call. Blocks committed
        before are skipped, so calling this after every chunk or step is cheap.
        """
        self._require_live(seq)
        if num_full_blocks > min(len(seq.block_ids), len(hashes)):
            raise InternalError(
                f"commit of {num_full_blocks} blocks: {len(seq.block_ids)} in the table, {len(hashes)} hashes"
            )
        if not self.enable_prefix_cache or num_full_blocks <= seq.num_committed_blocks:
            return
        start = seq.num_committed_blocks
        if start and hashes[start - 1] != seq.last_committed_hash:
            raise InternalError("commit with other hashes than before")
        for index in range(start, num_full_blocks):
            self._publish(seq, hashes[index], seq.block_ids[index])

    def release(self, seq: SequenceBlocks) -> None:
        """Drop every reference: published blocks stay cached, others become free. Idempotent."""
        if seq.released:
            return
        self._require_live(seq)
        seq.released = True
        self._sequences.remove(seq)
        for blocks in (seq.block_ids, seq.anchors):
            for block_id in blocks:
                if self._pool.decref(block_id):
                    self._trie.mark_idle(block_id)

    def check_integrity(self) -> None:
        """Verify every invariant from scratch; O(blocks). Raises `InternalError`."""
        self._pool.check_integrity()
        references: Counter[int] = Counter()
        for seq in self._sequences:
            if seq.released or len(set(seq.block_ids)) != len(seq.block_ids):
                raise InternalError("a live sequence is marked released or lists a block twice")
            if not seq.num_cached_blocks <= seq.num_committed_blocks <= len(seq.block_ids):
                raise InternalError("a sequence's cached, committed and total block counts are out of order")
            references.update(seq.block_ids)
            references.update(seq.anchors)
        published = self._trie.block_ids()
        for block_id in range(self.num_blocks):
            if self._pool.refcount(block_id) != references[block_id]:
                raise InternalError(f"block {block_id} has {references[block_id]} holders, not as counted")
            if self._pool.is_published(block_id) != (block_id in published):
                raise InternalError(f"pool and trie disagree on whether block {block_id} is published")
        self._trie.check_integrity(busy_blocks=set(references))

    def _hold_published(self, block_hash: bytes) -> int:
        block_id = self._trie.find(block_hash)
        assert block_id is not None, "ancestors of a cached block are cached"
        if self._pool.incref(block_id):
            self._trie.mark_busy(block_id)
        return block_id

    def _publish(self, seq: SequenceBlocks, block_hash: bytes, block_id: int) -> None:
        if self._trie.find(block_hash) is None:
            self._trie.insert(block_hash, seq.last_committed_hash, block_id)
            self._pool.publish(block_id)
        else:
            seq.anchors.append(self._hold_published(block_hash))
        seq.last_committed_hash = block_hash
        seq.num_committed_blocks += 1

    def _evict(self, num_blocks: int) -> None:
        evicted = self._trie.evict(num_blocks)
        assert len(evicted) == max(0, num_blocks), "every cached block can be evicted"
        for block_id in evicted:
            self._pool.evict(block_id)
        self._num_evicted_blocks += len(evicted)

    def _count_lookup(self, seq: SequenceBlocks) -> None:
        """Once, when the sequence gets its blocks: an admission taken back and retried counts once."""
        if seq.num_lookup_blocks:
            self._num_lookup_blocks += seq.num_lookup_blocks
            self._num_hit_blocks += seq.num_cached_blocks
            seq.num_lookup_blocks = 0

    def _require_live(self, seq: SequenceBlocks) -> None:
        if seq not in self._sequences:
            raise InternalError("a block table that was released, or that another manager admitted")
