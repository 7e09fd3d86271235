"""Prefix trie: matching against a dictionary of prefixes, and eviction from the leaves inwards."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InternalError
from common.kvcache.block_hash import hash_blocks
from common.kvcache.prefix_trie import PrefixTrie

SALT = b"salt"
prompts = st.lists(st.integers(0, 1), max_size=10)


def insert_path(trie: PrefixTrie, hashes: list[bytes]) -> None:
    """Add what is missing of a path, in blocks numbered in order of insertion."""
    for index in range(trie.match(hashes), len(hashes)):
        trie.insert(hashes[index], hashes[index - 1] if index else None, len(trie))


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.lists(prompts, max_size=8), prompts, st.integers(1, 3))
def test_match_equals_a_dictionary_of_token_prefixes(
    stored: list[list[int]], asked: list[int], block_size: int
) -> None:
    trie, model = PrefixTrie(), dict[tuple[int, ...], int]()
    for prompt in stored:
        insert_path(trie, hash_blocks(prompt, block_size, SALT))
        for end in range(block_size, len(prompt) + 1, block_size):
            model.setdefault(tuple(prompt[:end]), len(model))
    expected = 0
    while (expected + 1) * block_size <= len(asked) and tuple(asked[: (expected + 1) * block_size]) in model:
        expected += 1
    hashes = hash_blocks(asked, block_size, SALT)
    assert trie.match(hashes) == expected
    for index in range(expected):
        assert trie.find(hashes[index]) == model[tuple(asked[: (index + 1) * block_size])]
    trie.check_integrity(busy_blocks=trie.block_ids())


def test_only_idle_leaves_are_evicted() -> None:
    trie = PrefixTrie()
    insert_path(trie, hash_blocks([1, 2, 3], 1, SALT))
    assert trie.evict(1) == []
    trie.mark_idle(2)
    assert trie.evict(1) == [2]
    assert trie.evict(1) == []
    trie.mark_idle(1)
    trie.mark_idle(0)
    trie.check_integrity(busy_blocks=set())
    assert trie.evict(3) == [1, 0]
    assert len(trie) == 0


def test_a_parent_is_evicted_after_its_children_even_if_it_is_older() -> None:
    trie = PrefixTrie()
    insert_path(trie, hash_blocks([1, 2], 1, SALT))
    trie.mark_idle(0)
    trie.mark_idle(1)
    assert trie.evict(3) == [1, 0]


def test_the_branch_that_was_used_last_is_evicted_last() -> None:
    trie = PrefixTrie()
    for token in (1, 2, 3):
        insert_path(trie, hash_blocks([token], 1, SALT))
    for block in (0, 1, 2):
        trie.mark_idle(block)
    trie.mark_busy(0)
    trie.mark_idle(0)
    assert trie.evict(3) == [1, 2, 0]


def test_an_exposed_parent_keeps_its_age() -> None:
    trie = PrefixTrie()
    insert_path(trie, hash_blocks([1, 2], 1, SALT))
    insert_path(trie, hash_blocks([3], 1, SALT))
    for block in (0, 1, 2):
        trie.mark_idle(block)
    assert trie.evict(3) == [1, 0, 2]


def test_inserting_a_known_hash_or_below_an_unknown_parent_is_an_error() -> None:
    trie = PrefixTrie()
    first, second, third = hash_blocks([1, 2, 3], 1, SALT)
    trie.insert(first, None, 0)
    with pytest.raises(InternalError):
        trie.insert(first, None, 1)
    with pytest.raises(InternalError):
        trie.insert(second, first, 0)
    with pytest.raises(InternalError):
        trie.insert(third, second, 1)
    trie.check_integrity(busy_blocks={0})
    assert len(trie) == 1


def test_an_idle_block_gets_no_children() -> None:
    trie = PrefixTrie()
    first, second = hash_blocks([1, 2], 1, SALT)
    trie.insert(first, None, 0)
    trie.mark_idle(0)
    with pytest.raises(InternalError, match="idle"):
        trie.insert(second, first, 1)
    assert trie.evict(1) == [0]


def test_the_integrity_check_notices_a_busy_block_below_an_idle_one() -> None:
    trie = PrefixTrie()
    insert_path(trie, hash_blocks([1, 2], 1, SALT))
    trie.mark_idle(0)
    with pytest.raises(InternalError, match="busy below"):
        trie.check_integrity(busy_blocks={1})
