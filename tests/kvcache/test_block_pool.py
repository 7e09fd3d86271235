"""Block pool: three states that always add up, and misuse that is always noticed."""

import pytest

from common.errors import InternalError, InvalidArgument
from common.kvcache.block_pool import BlockPool


def counts(pool: BlockPool) -> tuple[int, int, int]:
    pool.check_integrity()
    return pool.num_free, pool.num_cached, pool.num_held


def take(pool: BlockPool, num_blocks: int) -> list[int]:
    blocks = pool.alloc(num_blocks)
    assert blocks is not None
    return blocks


def test_alloc_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.alloc(5) is None
    assert counts(pool) == (4, 0, 0)
    assert len(set(take(pool, 3))) == 3
    assert pool.alloc(2) is None
    assert counts(pool) == (1, 0, 3)


def test_alloc_of_nothing_takes_nothing() -> None:
    pool = BlockPool(2)
    assert pool.alloc(0) == []
    assert counts(pool) == (2, 0, 0)


def test_an_unpublished_block_is_free_after_its_last_reference() -> None:
    pool = BlockPool(2)
    (block,) = take(pool, 1)
    assert pool.incref(block) is False
    assert pool.decref(block) is False
    assert counts(pool) == (1, 0, 1)
    assert pool.decref(block) is False
    assert counts(pool) == (2, 0, 0)


def test_a_published_block_is_cached_until_evicted() -> None:
    pool = BlockPool(2)
    (block,) = take(pool, 1)
    pool.publish(block)
    assert pool.is_published(block)
    assert pool.decref(block) is True
    assert counts(pool) == (1, 1, 0)
    pool.evict(block)
    assert not pool.is_published(block)
    assert counts(pool) == (2, 0, 0)


def test_a_cached_block_can_be_held_again() -> None:
    pool = BlockPool(1)
    (block,) = take(pool, 1)
    pool.publish(block)
    pool.decref(block)
    assert pool.incref(block) is True
    assert pool.refcount(block) == 1
    assert counts(pool) == (0, 0, 1)


def test_cached_blocks_are_not_allocated() -> None:
    pool = BlockPool(1)
    (block,) = take(pool, 1)
    pool.publish(block)
    pool.decref(block)
    assert pool.alloc(1) is None


def test_misuse_is_an_internal_error() -> None:
    pool = BlockPool(2)
    (held,) = take(pool, 1)
    free = 1 - held
    for misuse in (pool.incref, pool.decref, pool.publish, pool.evict):
        with pytest.raises(InternalError):
            misuse(free)
    with pytest.raises(InternalError):
        pool.evict(held)
    pool.publish(held)
    with pytest.raises(InternalError):
        pool.publish(held)
    assert counts(pool) == (1, 0, 1)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="num_blocks"):
        BlockPool(0)


def test_the_integrity_check_notices_a_lost_block() -> None:
    pool = BlockPool(2)
    pool._free.pop()
    with pytest.raises(InternalError):
        pool.check_integrity()


def test_the_integrity_check_notices_a_wrong_cached_count() -> None:
    pool = BlockPool(2)
    pool._num_cached += 1
    with pytest.raises(InternalError):
        pool.check_integrity()
