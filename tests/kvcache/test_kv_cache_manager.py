"""KV cache manager: reuse, eviction, sequences that compute one prefix at once, invariants under any calls.

The state machine models content: every write of a block is recorded, so reuse of a block that somebody still
reads, or a hit on a block whose content is not that prefix, is seen.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import InternalError, InvalidArgument
from common.kvcache.block_hash import hash_blocks
from common.kvcache.kv_cache_manager import KVCacheManager, SequenceBlocks

BLOCK_SIZE = 2
SALT = b"salt"


def hashes_of(token_ids: list[int]) -> list[bytes]:
    return hash_blocks(token_ids, BLOCK_SIZE, SALT)


def prompt(num_blocks: int, last: int = 0) -> list[int]:
    """Prompts that share all blocks but the last one, unless `last` is the same too."""
    return [7] * (num_blocks - 1) * BLOCK_SIZE + [last] * BLOCK_SIZE


def run_sequence(manager: KVCacheManager, token_ids: list[int]) -> SequenceBlocks:
    """Admit, extend and commit all of a prompt's full blocks."""
    hashes = hashes_of(token_ids)
    seq = manager.admit(hashes, max_cached_blocks=len(hashes))
    assert manager.extend(seq, len(hashes))
    manager.commit(seq, hashes, len(hashes))
    manager.check_integrity()
    return seq


def counts(manager: KVCacheManager) -> tuple[int, int, int]:
    manager.check_integrity()
    stats = manager.stats()
    return stats.num_free, stats.num_cached, stats.num_held


def test_a_released_prefix_is_found_again() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    first = run_sequence(manager, prompt(3))
    blocks = list(first.block_ids)
    manager.release(first)
    assert counts(manager) == (5, 3, 0)
    assert manager.match_prefix(hashes_of(prompt(3))) == 3
    assert manager.match_prefix(hashes_of(prompt(3, last=1))) == 2
    second = manager.admit(hashes_of(prompt(3, last=1)), max_cached_blocks=9)
    assert (second.block_ids, second.num_cached_blocks) == (blocks[:2], 2)
    assert counts(manager) == (5, 1, 2)


def test_blocks_that_were_not_committed_are_free_after_release() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    hashes = hashes_of(prompt(3))
    seq = manager.admit(hashes, 3)
    manager.extend(seq, 4)
    manager.commit(seq, hashes, 1)
    manager.release(seq)
    assert counts(manager) == (7, 1, 0)
    assert manager.match_prefix(hashes) == 1


def test_blocks_in_flight_are_shared_by_live_sequences() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    first = run_sequence(manager, prompt(2))
    second = manager.admit(hashes_of(prompt(2)), max_cached_blocks=2)
    assert second.block_ids == first.block_ids
    manager.release(first)
    assert counts(manager) == (6, 0, 2)
    manager.release(second)
    assert counts(manager) == (6, 2, 0)


def test_the_last_token_of_a_cached_prompt_is_computed_in_a_block_of_its_own() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    manager.release(run_sequence(manager, prompt(2)))
    num_tokens = 2 * BLOCK_SIZE
    seq = manager.admit(hashes_of(prompt(2)), max_cached_blocks=(num_tokens - 1) // BLOCK_SIZE)
    assert seq.num_cached_blocks == 1
    assert manager.extend(seq, 2)
    manager.commit(seq, hashes_of(prompt(2)), 2)
    manager.release(seq)
    assert counts(manager) == (6, 2, 0)


def test_extend_is_all_or_nothing() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    manager.release(run_sequence(manager, prompt(2)))
    holder = manager.admit([], 0)
    assert manager.extend(holder, 1)
    assert not manager.extend(holder, 5)
    assert len(holder.block_ids) == 1
    assert counts(manager) == (1, 2, 1)
    assert manager.match_prefix(hashes_of(prompt(2))) == 2


def test_extend_evicts_when_free_blocks_run_out() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    manager.release(run_sequence(manager, prompt(2, last=1)))
    manager.release(run_sequence(manager, prompt(2, last=2)))
    seq = manager.admit([], 0)
    assert manager.extend(seq, 2)
    assert manager.stats().num_evicted_blocks == 1
    assert manager.match_prefix(hashes_of(prompt(2, last=1))) == 1
    assert manager.match_prefix(hashes_of(prompt(2, last=2))) == 2
    assert manager.extend(seq, 4)
    assert counts(manager) == (0, 0, 4)
    assert manager.match_prefix(hashes_of(prompt(2, last=2))) == 0


def test_blocks_in_use_are_never_evicted() -> None:
    manager = KVCacheManager(3, BLOCK_SIZE)
    run_sequence(manager, prompt(2))
    seq = manager.admit([], 0)
    assert not manager.extend(seq, 2)
    assert manager.match_prefix(hashes_of(prompt(2))) == 2


def test_extending_to_a_shorter_table_changes_nothing() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    seq = manager.admit([], 0)
    assert manager.extend(seq, 3)
    before = list(seq.block_ids)
    assert manager.extend(seq, 1)
    assert seq.block_ids == before


def test_the_second_of_two_equal_sequences_keeps_its_table_and_frees_its_copies() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    hashes = hashes_of(prompt(2))
    first, second = manager.admit(hashes, 2), manager.admit(hashes, 2)
    for seq in (first, second):
        assert manager.extend(seq, 2)
    table = list(second.block_ids)
    manager.commit(first, hashes, 2)
    manager.commit(second, hashes, 2)
    assert second.block_ids == table
    assert set(table).isdisjoint(first.block_ids)
    manager.release(second)
    assert counts(manager) == (6, 0, 2)
    manager.release(first)
    assert counts(manager) == (6, 2, 0)


def test_a_copy_may_publish_what_follows_the_twin_of_another_sequence() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    short, long = hashes_of(prompt(2)), hashes_of([*prompt(2), 1, 1])
    first, second = manager.admit(short, 2), manager.admit(long, 3)
    assert manager.extend(first, 2)
    assert manager.extend(second, 3)
    manager.commit(first, short, 2)
    manager.commit(second, long, 3)
    manager.release(first)
    assert counts(manager) == (3, 0, 5)  # the published twins stay: the third block builds on them
    assert manager.match_prefix(long) == 3
    manager.release(second)
    assert counts(manager) == (5, 3, 0)
    flood = manager.admit([], 0)
    assert manager.extend(flood, 8)
    assert counts(manager) == (0, 0, 8)


def test_two_sequences_that_commit_in_turns_share_one_published_path() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE)
    hashes = hashes_of(prompt(3))
    pair = (manager.admit(hashes, 3), manager.admit(hashes, 3))
    for seq in pair:
        assert manager.extend(seq, 3)
    for step in range(3):
        manager.commit(pair[step % 2], hashes, step + 1)
        manager.check_integrity()
    manager.release(pair[0])
    manager.check_integrity()
    manager.release(pair[1])
    assert counts(manager) == (5, 3, 0)


def test_release_is_idempotent_and_ends_the_table() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    seq = run_sequence(manager, prompt(2))
    manager.release(seq)
    manager.release(seq)
    assert counts(manager) == (2, 2, 0)
    with pytest.raises(InternalError):
        manager.extend(seq, 3)
    with pytest.raises(InternalError):
        manager.commit(seq, hashes_of(prompt(2)), 2)


def test_a_table_of_another_manager_is_refused() -> None:
    seq = KVCacheManager(4, BLOCK_SIZE).admit([], 0)
    with pytest.raises(InternalError):
        KVCacheManager(4, BLOCK_SIZE).release(seq)


def test_commit_of_blocks_that_are_not_there_is_refused() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    seq = manager.admit([], 0)
    assert manager.extend(seq, 1)
    with pytest.raises(InternalError, match="1 in the table"):
        manager.commit(seq, hashes_of(prompt(2)), 2)


def test_commit_with_another_prefix_than_before_is_refused() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    seq = manager.admit([], 0)
    assert manager.extend(seq, 2)
    manager.commit(seq, hashes_of([1, 1]), 1)
    with pytest.raises(InternalError, match="other hashes"):
        manager.commit(seq, hashes_of([2, 2, 3, 3]), 2)


def test_without_prefix_cache_nothing_is_kept() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE, enable_prefix_cache=False)
    manager.release(run_sequence(manager, prompt(2)))
    assert counts(manager) == (4, 0, 0)
    assert manager.match_prefix(hashes_of(prompt(2))) == 0


def test_hits_are_counted_in_tokens_once_the_sequence_has_its_blocks() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    manager.release(run_sequence(manager, prompt(3)))
    refused = manager.admit(hashes_of(prompt(3, last=1)), 3)
    assert not manager.extend(refused, 9)
    manager.release(refused)
    seq = manager.admit(hashes_of(prompt(3, last=1)), 3)
    assert manager.extend(seq, 3)
    assert manager.extend(seq, 4) is True
    stats = manager.stats()
    assert (stats.num_lookup_tokens, stats.num_hit_tokens) == (6 * BLOCK_SIZE, 2 * BLOCK_SIZE)


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="block_size"):
        KVCacheManager(4, 0)


def test_the_integrity_check_notices_a_lost_reference() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE)
    seq = run_sequence(manager, prompt(2))
    seq.block_ids.pop()
    with pytest.raises(InternalError):
        manager.check_integrity()


@dataclass(slots=True, eq=False)
class Running:
    """A live sequence of the model: what it is about and how far it got."""

    token_ids: list[int]
    hashes: list[bytes]
    seq: SequenceBlocks
    num_written: int = field(default=0)

    def prefix(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(self.token_ids[: num_blocks * BLOCK_SIZE])


class ManagerMachine(RuleBasedStateMachine):
    """Sequences over a small alphabet, so that prefixes collide, in a pool that is always short of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = KVCacheManager(10, BLOCK_SIZE)
        self.running: list[Running] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> token prefix of its KV

    def pick(self, index: int) -> Running:
        return self.running[index % len(self.running)]

    @rule(token_ids=st.lists(st.integers(0, 1), max_size=12), cap=st.integers(0, 6))
    def admit(self, token_ids: list[int], cap: int) -> None:
        hashes = hashes_of(token_ids)
        estimate = self.manager.match_prefix(hashes)
        seq = self.manager.admit(hashes, cap)
        assert seq.num_cached_blocks == len(seq.block_ids) == min(cap, estimate)
        running = Running(token_ids, hashes, seq, seq.num_cached_blocks)
        for index, block_id in enumerate(seq.block_ids):
            assert self.content[block_id] == running.prefix(index + 1), "a hit on another prefix's content"
        self.running.append(running)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 20), num_blocks=st.integers(0, 8))
    def extend(self, index: int, num_blocks: int) -> None:
        seq = self.pick(index).seq
        before, stats = list(seq.block_ids), self.manager.stats()
        possible = num_blocks - len(before) <= stats.num_free + stats.num_cached
        assert self.manager.extend(seq, num_blocks) is possible
        if not possible:
            assert (seq.block_ids, self.manager.stats()) == (before, stats)
            return
        assert seq.block_ids[: len(before)] == before
        assert len(seq.block_ids) == max(len(before), num_blocks)
        for block_id in seq.block_ids[len(before) :]:
            self.content[block_id] = ()

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 20), num_blocks=st.integers(0, 6), publish=st.booleans())
    def compute(self, index: int, num_blocks: int, publish: bool) -> None:
        """Write blocks of the sequence, then perhaps commit all that was written."""
        running = self.pick(index)
        end = min(num_blocks, len(running.hashes), len(running.seq.block_ids))
        for position in range(running.num_written, end):
            self.content[running.seq.block_ids[position]] = running.prefix(position + 1)
        running.num_written = max(running.num_written, end)
        if publish:
            table = list(running.seq.block_ids)
            self.manager.commit(running.seq, running.hashes, running.num_written)
            assert running.seq.block_ids == table
            assert self.manager.match_prefix(running.hashes) >= running.num_written

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 20), twice=st.booleans())
    def release(self, index: int, twice: bool) -> None:
        running = self.running.pop(index % len(self.running))
        matched = self.manager.match_prefix(running.hashes)
        self.manager.release(running.seq)
        if twice:
            self.manager.release(running.seq)
        assert self.manager.match_prefix(running.hashes) == matched

    @invariant()
    def books_balance(self) -> None:
        self.manager.check_integrity()
        stats = self.manager.stats()
        assert stats.num_free + stats.num_cached + stats.num_held == self.manager.num_blocks
        if not self.running:
            assert stats.num_held == 0

    @invariant()
    def nobody_reads_what_another_overwrote(self) -> None:
        for running in self.running:
            for position in range(running.num_written):
                assert self.content[running.seq.block_ids[position]] == running.prefix(position + 1)

    def teardown(self) -> None:
        """However it got here, every available block can be had, and not one more."""
        probe = self.manager.admit([], 0)
        assert not self.manager.extend(probe, self.manager.num_available + 1)
        assert self.manager.extend(probe, self.manager.num_available)
        self.manager.check_integrity()
        self.manager.release(probe)
        self.books_balance()
        self.nobody_reads_what_another_overwrote()


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(
    deadline=None, max_examples=80, stateful_step_count=40, derandomize=True, database=None
)
