"""Slot pool: order of waiters, stale handles, quarantine, and its invariants under any calls."""

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import InternalError, InvalidArgument, ResourceExhausted
from common.kvcache.grant import NUM_GENERATIONS, SlotHandle
from common.kvcache.slot_pool import SlotPool


def counter() -> Callable[[], int]:
    return count(1000).__next__


def make_pool(num_slots: int = 2, num_ranks: int = 2, max_waiters: int = 3) -> SlotPool[str]:
    return SlotPool(num_slots, num_ranks, max_waiters, counter())


def granted(pool: SlotPool[str], waiter: str) -> SlotHandle:
    handle = pool.request(waiter)
    assert handle is not None
    return handle


def test_a_free_slot_is_granted_at_once() -> None:
    pool = make_pool()
    handle = granted(pool, "a")
    assert (pool.num_free, pool.num_granted, pool.num_quarantined) == (1, 1, 0)
    assert pool.release(handle)


def test_waiters_are_served_in_order() -> None:
    pool = make_pool(num_slots=1)
    handle = granted(pool, "a")
    assert [pool.request(waiter) for waiter in "bcd"] == [None] * 3
    served = []
    for _ in range(3):
        assert pool.release(handle)
        ((waiter, handle),) = pool.grant_waiting()
        served.append(waiter)
    assert served == ["b", "c", "d"]


def test_nobody_overtakes_the_queue() -> None:
    pool = make_pool(num_slots=1)
    handle = granted(pool, "a")
    pool.request("b")
    pool.release(handle)
    assert pool.request("c") is None
    assert [waiter for waiter, _ in pool.grant_waiting()] == ["b"]


def test_a_full_queue_is_resource_exhausted_and_changes_nothing() -> None:
    pool = make_pool(num_slots=1, max_waiters=1)
    granted(pool, "a")
    pool.request("b")
    with pytest.raises(ResourceExhausted):
        pool.request("c")
    assert pool.num_waiting == 1
    assert not pool.cancel("c")


def test_a_waiter_that_left_is_not_served() -> None:
    pool = make_pool(num_slots=1)
    handle = granted(pool, "a")
    pool.request("b")
    pool.request("c")
    assert pool.cancel("b")
    pool.release(handle)
    assert [waiter for waiter, _ in pool.grant_waiting()] == ["c"]


def test_waiting_twice_under_one_name_is_an_error() -> None:
    pool = make_pool(num_slots=1)
    granted(pool, "a")
    pool.request("b")
    with pytest.raises(InternalError):
        pool.request("b")


def test_a_stale_handle_does_nothing() -> None:
    pool = make_pool(num_slots=1)
    stale = granted(pool, "a")
    assert pool.release(stale)
    current = granted(pool, "b")
    assert not pool.release(stale)
    assert not pool.quarantine(stale)
    assert not pool.end_quarantine(stale)
    assert pool.num_granted == 1
    assert pool.release(current)


def test_a_released_slot_cannot_be_released_again() -> None:
    pool = make_pool()
    handle = granted(pool, "a")
    assert pool.release(handle)
    assert not pool.release(handle)
    pool.check_integrity()
    assert pool.num_free == 2


def test_a_slot_in_quarantine_is_neither_granted_nor_released() -> None:
    pool = make_pool(num_slots=1)
    handle = granted(pool, "a")
    assert pool.quarantine(handle)
    assert (pool.num_granted, pool.num_quarantined) == (0, 1)
    assert not pool.release(handle)
    assert pool.request("b") is None
    assert pool.grant_waiting() == []
    assert pool.end_quarantine(handle)
    assert [waiter for waiter, _ in pool.grant_waiting()] == ["b"]


def test_quarantine_lasts_until_every_rank_in_doubt_has_drained() -> None:
    pool = make_pool(num_slots=1, num_ranks=4)
    handle = granted(pool, "a")
    assert pool.quarantine(handle, ranks=[1, 3])
    assert not pool.end_quarantine(handle, rank=1)
    assert not pool.end_quarantine(handle, rank=1)
    assert not pool.end_quarantine(handle, rank=0)
    assert pool.num_quarantined == 1
    assert pool.end_quarantine(handle, rank=3)
    assert pool.num_free == 1


@pytest.mark.parametrize("ranks", [[], [2], [-1]])
def test_quarantine_on_ranks_that_do_not_exist_is_an_error(ranks: list[int]) -> None:
    pool = make_pool(num_ranks=2)
    handle = granted(pool, "a")
    with pytest.raises(InternalError):
        pool.quarantine(handle, ranks)
    assert pool.release(handle)


def test_generations_count_the_uses_of_each_slot_and_wrap() -> None:
    pool = make_pool(num_slots=1)
    generations = []
    for _ in range(NUM_GENERATIONS + 2):
        handle = granted(pool, "a")
        generations.append(handle.generation)
        pool.release(handle)
    assert generations == [*range(NUM_GENERATIONS), 0, 1]


def test_nonces_come_from_the_source_and_keep_32_bits() -> None:
    nonces = iter([5, 2**40 + 6])
    pool: SlotPool[str] = SlotPool(2, 1, 0, lambda: next(nonces))
    assert (granted(pool, "a").nonce, granted(pool, "b").nonce) == (5, 6)


@pytest.mark.parametrize(("num_slots", "num_ranks"), [(0, 1), (257, 1), (1, 0)])
def test_sizes_out_of_bounds_are_refused(num_slots: int, num_ranks: int) -> None:
    with pytest.raises(InvalidArgument):
        SlotPool(num_slots, num_ranks, 1, counter())


def test_the_integrity_check_notices_a_slot_that_is_free_twice() -> None:
    pool = make_pool()
    pool._free.append(0)
    with pytest.raises(InternalError):
        pool.check_integrity()


class SlotPoolMachine(RuleBasedStateMachine):
    """Against a model that keeps the live handles and the queue as plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: SlotPool[int] = SlotPool(num_slots=3, num_ranks=2, max_waiters=4, nonce=counter())
        self.live: list[SlotHandle] = []
        self.doubtful: dict[SlotHandle, set[int]] = {}
        self.stale: list[SlotHandle] = []
        self.queue: list[int] = []
        self.names = count()
        self.seen: set[SlotHandle] = set()

    def accept(self, handle: SlotHandle) -> None:
        assert handle not in self.seen, "a handle was given out twice"
        assert all(handle.slot != other.slot for other in (*self.live, *self.doubtful))
        self.seen.add(handle)
        self.live.append(handle)

    @rule()
    def request(self) -> None:
        name = next(self.names)
        num_free = 3 - len(self.live) - len(self.doubtful)
        if num_free and not self.queue:
            handle = self.pool.request(name)
            assert handle is not None
            self.accept(handle)
        elif len(self.queue) < 4:
            assert self.pool.request(name) is None
            self.queue.append(name)
        else:
            with pytest.raises(ResourceExhausted):
                self.pool.request(name)

    @rule()
    def grant_waiting(self) -> None:
        num_grants = min(3 - len(self.live) - len(self.doubtful), len(self.queue))
        pairs = self.pool.grant_waiting()
        assert [name for name, _ in pairs] == self.queue[:num_grants]
        del self.queue[:num_grants]
        for _, handle in pairs:
            self.accept(handle)

    @precondition(lambda self: self.queue)
    @rule(index=st.integers(0, 3))
    def cancel(self, index: int) -> None:
        assert self.pool.cancel(self.queue.pop(index % len(self.queue)))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 2))
    def release(self, index: int) -> None:
        handle = self.live.pop(index % len(self.live))
        assert self.pool.release(handle)
        self.stale.append(handle)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 2), ranks=st.sets(st.integers(0, 1), min_size=1))
    def quarantine(self, index: int, ranks: set[int]) -> None:
        handle = self.live.pop(index % len(self.live))
        assert self.pool.quarantine(handle, ranks)
        self.doubtful[handle] = set(ranks)

    @precondition(lambda self: self.doubtful)
    @rule(index=st.integers(0, 2), rank=st.integers(0, 1))
    def end_quarantine(self, index: int, rank: int) -> None:
        handle = list(self.doubtful)[index % len(self.doubtful)]
        self.doubtful[handle].discard(rank)
        is_over = not self.doubtful[handle]
        assert self.pool.end_quarantine(handle, rank) is is_over
        if is_over:
            del self.doubtful[handle]
            self.stale.append(handle)

    @precondition(lambda self: self.stale)
    @rule(index=st.integers(0, 50))
    def use_a_stale_handle(self, index: int) -> None:
        handle = self.stale[index % len(self.stale)]
        assert not self.pool.release(handle)
        assert not self.pool.quarantine(handle)
        assert not self.pool.end_quarantine(handle)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_granted == len(self.live)
        assert self.pool.num_quarantined == len(self.doubtful)
        assert self.pool.num_free + self.pool.num_granted + self.pool.num_quarantined == 3
        assert self.pool.num_waiting == len(self.queue)


TestSlotPoolMachine = SlotPoolMachine.TestCase
TestSlotPoolMachine.settings = settings(
    deadline=None, max_examples=80, stateful_step_count=40, derandomize=True, database=None
)
