"""Eviction: the queue follows its order whatever was pushed and discarded before."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.kvcache.eviction import EvictionQueue


def drain(queue: EvictionQueue) -> list[int]:
    blocks = []
    while (block := queue.pop()) is not None:
        blocks.append(block)
    return blocks


def test_the_block_that_was_let_go_first_goes_first() -> None:
    queue = EvictionQueue()
    for block, last_used in ((1, 30), (2, 10), (3, 20)):
        queue.push(block, last_used)
    assert drain(queue) == [2, 3, 1]


def test_a_block_that_is_pushed_again_takes_its_new_place() -> None:
    queue = EvictionQueue()
    queue.push(1, 1)
    queue.push(2, 2)
    queue.push(1, 3)
    assert len(queue) == 2
    assert drain(queue) == [2, 1]


operations = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=300)


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(operations)
def test_the_queue_equals_a_sorted_dictionary(steps: list[tuple[int, bool]]) -> None:
    queue, model = EvictionQueue(), dict[int, int]()
    for time, (block, is_push) in enumerate(steps):
        if is_push:
            queue.push(block, time)
            model[block] = time
        else:
            queue.discard(block)
            model.pop(block, None)
        assert len(queue) == len(model)
        assert (block in queue) == (block in model)
    assert drain(queue) == sorted(model, key=model.__getitem__)


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20), st.integers(0, 3))
def test_push_and_pop_equals_the_two(entries: list[tuple[int, bool]], last_used: int) -> None:
    one, other = EvictionQueue(), EvictionQueue()
    for queue in (one, other):
        for block, (used, is_stale) in enumerate(entries):
            queue.push(block, used)
            if is_stale:
                queue.discard(block)
    other.push(99, last_used)
    assert one.push_and_pop(99, last_used) == other.pop()
    assert drain(one) == drain(other)


def test_stale_entries_do_not_pile_up() -> None:
    queue = EvictionQueue()
    for time in range(10_000):
        queue.push(0, time)
    assert len(queue._heap) < 100
