"""First come, first served, never more than the places there are, and nothing leaks when a waiter goes away."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ResourceExhausted
from services.router.admission import MAX_RETRY_S, MIN_RETRY_S, Admission, AdmissionQueue


@settings(deadline=None, max_examples=200)
@given(
    st.integers(4, 12), st.integers(0, 5), st.lists(st.tuples(st.sampled_from("elg"), st.integers(1, 4)), max_size=60)
)
def test_places_are_kept_and_order_is_arrival(
    max_in_flight: int, max_waiting: int, steps: list[tuple[str, int]]
) -> None:
    queue = AdmissionQueue(max_in_flight, max_waiting)
    running: dict[int, int] = {}
    waiting: dict[int, int] = {}
    for request, (step, size) in enumerate(steps):
        admitted: list[int] = []
        if step == "e":
            try:
                if queue.enter(request, size):
                    assert not waiting
                    running[request] = size
                else:
                    waiting[request] = size
            except ResourceExhausted as error:
                retry_after_s = error.retry_after_s
                assert len(waiting) == max_waiting
                assert MIN_RETRY_S <= retry_after_s <= MAX_RETRY_S
        elif step == "l" and running:
            admitted = queue.leave(running.pop(next(iter(running))), now_s=float(request))
        elif step == "g" and waiting:
            gone = list(waiting)[size % len(waiting)]
            del waiting[gone]
            admitted = queue.give_up(gone)
        assert admitted == list(waiting)[: len(admitted)]
        running.update({name: waiting.pop(name) for name in admitted})
        assert queue.num_in_flight == sum(running.values()) <= max_in_flight
        assert queue.num_waiting == len(waiting) <= max_waiting
        first_waiting = next(iter(waiting.values()), None)
        assert first_waiting is None or queue.num_in_flight + first_waiting > max_in_flight


def test_the_hint_follows_the_recent_rate() -> None:
    queue = AdmissionQueue(1, 3)
    queue.enter(0, 1)
    for request in (1, 2, 3):
        queue.enter(request, 1)
    for step in range(3):
        queue.leave(1, now_s=2.0 * step)
        queue.enter(10 + step, 1)
    with pytest.raises(ResourceExhausted) as caught:
        queue.enter(99, 1)
    assert caught.value.retry_after_s == pytest.approx(2.0 * 4)


def test_idle_time_is_no_part_of_the_rate() -> None:
    queue = AdmissionQueue(2, 1)
    now_s = 0.0
    for idle_s in (0.0, 3600.0):
        now_s += idle_s
        for request in range(3):
            queue.enter(request, 1)
        for request in range(3, 20):  # a place comes free every 0.5 s, and is taken
            now_s += 0.5
            queue.leave(1, now_s)
            queue.enter(request, 1)
        assert queue.retry_after_s() == pytest.approx(0.5 * 2)
        for _ in range(3):
            now_s += 0.5
            queue.leave(1, now_s)
        assert queue.num_in_flight == 0


async def test_a_waiter_that_is_cancelled_frees_its_turn() -> None:
    admission = Admission(AdmissionQueue(1, 4))
    order: list[str] = []

    async def use(name: str, leave: asyncio.Event) -> None:
        async with admission.places(1):
            order.append(name)
            await leave.wait()

    leave = asyncio.Event()
    tasks = [asyncio.create_task(use(name, leave)) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    leave.set()
    await asyncio.gather(tasks[0], tasks[2])
    assert order == ["a", "c"]
    assert admission.queue.num_in_flight == admission.queue.num_waiting == 0


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_cancelled_in_the_very_turn_of_its_admission_gives_its_places_back(cancel_first: bool) -> None:
    admission = Admission(AdmissionQueue(1, 4))

    async def use() -> None:
        async with admission.places(1):
            pass

    holder = admission.places(1)
    await holder.__aenter__()
    waiters = [asyncio.create_task(use()) for _ in range(2)]
    await asyncio.sleep(0)
    if cancel_first:
        waiters[0].cancel()
        await holder.__aexit__(None, None, None)
    else:
        await holder.__aexit__(None, None, None)
        waiters[0].cancel()
    await asyncio.wait(waiters)
    assert waiters[0].cancelled()
    assert not waiters[1].cancelled()
    assert admission.queue.num_in_flight == admission.queue.num_waiting == 0


async def test_a_long_queue_that_gives_up_at_once_loses_no_place() -> None:
    num_waiting = 10_000
    admission = Admission(AdmissionQueue(16, num_waiting))
    leave = asyncio.Event()

    async def use(num_places: int, until: asyncio.Event | None = None) -> None:
        async with admission.places(num_places):
            if until is not None:
                await until.wait()

    holder = asyncio.create_task(use(16, leave))
    await asyncio.sleep(0)
    waiters = [asyncio.create_task(use(1 + index % 16)) for index in range(num_waiting)]
    await asyncio.sleep(0)
    assert admission.queue.num_waiting == num_waiting
    leave.set()  # the holder leaves before any of them has noticed that it is cancelled
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(holder, *waiters, return_exceptions=True)
    assert holder.exception() is None
    assert admission.queue.num_in_flight == admission.queue.num_waiting == 0
    await asyncio.wait_for(use(16), 1)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(4, 16))
def test_storms_of_cancellation_leave_every_place_free(seed: int, num_tasks: int, max_in_flight: int) -> None:
    async def storm() -> None:
        rng = random.Random(seed)
        admission = Admission(AdmissionQueue(max_in_flight, num_tasks))

        async def use() -> None:
            async with admission.places(rng.randint(1, 4)):
                for _ in range(rng.randint(0, 2)):
                    await asyncio.sleep(0)
                if rng.random() < 0.1:
                    raise ValueError("the request fails")

        tasks = [asyncio.create_task(use()) for _ in range(num_tasks)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            if rng.random() < 0.5:
                for task in rng.sample(tasks, rng.randint(0, len(tasks))):
                    task.cancel()
        queue = admission.queue
        assert queue.num_in_flight == queue.num_waiting == 0
        failures = [task.exception() for task in tasks if not task.cancelled()]
        assert all(failure is None or isinstance(failure, ValueError) for failure in failures)

    asyncio.run(storm())


def test_places_that_nobody_used_are_no_part_of_the_rate() -> None:
    queue = AdmissionQueue(1, 4)
    queue.enter(0, 1)
    for step in range(3):  # a place comes free every 2 s
        queue.enter(1 + step, 1)
        queue.leave(1, now_s=2.0 * step)
    expected_s = queue.retry_after_s()
    queue.enter(10, 1)
    assert queue.hand_back(1) == [10]
    assert queue.retry_after_s() == expected_s


async def test_places_of_complete_outputs_go_to_others_as_long_as_few_are_unread() -> None:
    admission = Admission(AdmissionQueue(2, 4))
    queue = admission.queue
    async with contextlib.AsyncExitStack() as unread:
        for _ in range(2):
            places = await unread.enter_async_context(admission.places(1))
            places.complete()
            places.complete()
        assert (queue.num_in_flight, queue.num_unread) == (0, 2)
        async with admission.places(2) as kept:
            kept.complete()  # too much waits for clients: the places stay
            assert (queue.num_in_flight, queue.num_unread) == (2, 2)
        assert (queue.num_in_flight, queue.num_unread) == (0, 2)
    assert (queue.num_in_flight, queue.num_unread) == (0, 0)


async def test_completing_lets_the_next_one_in() -> None:
    admission = Admission(AdmissionQueue(1, 4))
    entered = asyncio.Event()

    async def follow() -> None:
        async with admission.places(1):
            entered.set()

    async with admission.places(1) as places:
        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        assert not entered.is_set()
        places.complete()
        await asyncio.wait_for(entered.wait(), 1)
    await following
    assert admission.queue.num_in_flight == admission.queue.num_unread == 0
