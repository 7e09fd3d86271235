"""Copies are done in order, wherever they run, and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch

from common import short_sleep
from common.kvcache.device_queue import DeviceWork
from common.kvcache.slot_copies import SlotCopies

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeWork(DeviceWork):
    """Device work that is done when the test says so."""

    def __init__(self, outcome: Callable[[bytes], None] | None = None) -> None:
        super().__init__(None, None, outcome)
        self.finished = threading.Event()
        self.num_looks = 0

    def done(self) -> bool:
        self.num_looks += 1
        return self.finished.is_set()

    def wait(self) -> None:
        assert self.finished.wait(5)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_sleep, "pause", lambda seconds: None)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_gpus_copies_are_launched_at_once_and_end_in_order() -> None:
    copies, works = SlotCopies(GPU, "test"), [FakeWork(), FakeWork()]
    futures = [copies.run(lambda work=work: work) for work in works]  # type: ignore[misc]
    works[1].finished.set()
    await turns()
    assert [future.done() for future in futures] == [False, False]
    works[0].finished.set()
    await turns()
    assert [future.done() for future in futures] == [True, True]


async def test_the_loop_goes_on_while_a_gpu_copies_and_rests_when_it_is_done() -> None:
    copies, work = SlotCopies(GPU, "test"), FakeWork()
    future = copies.run(lambda: work)
    await turns(20)
    assert work.num_looks > 10
    work.finished.set()
    await future
    looks = work.num_looks
    await turns()
    assert work.num_looks == looks


async def test_a_cancelled_future_does_not_hold_up_the_next() -> None:
    copies, works = SlotCopies(GPU, "test"), [FakeWork(), FakeWork()]
    first, second = (copies.run(lambda work=work: work) for work in works)  # type: ignore[misc]
    first.cancel()
    for work in works:
        work.finished.set()
    await asyncio.wait_for(second, 20)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
async def test_a_failed_start_fails_its_future_alone(device: torch.device) -> None:
    copies = SlotCopies(device, "test")

    def fail() -> DeviceWork:
        raise RuntimeError("no")

    failed, fine = copies.run(fail), copies.run(lambda: None)
    with pytest.raises(RuntimeError, match="no"):
        await failed
    await fine
    copies.close()


async def test_what_a_gpu_found_wrong_fails_its_future_alone() -> None:
    def refuse(_: bytes) -> None:
        raise RuntimeError("damaged")

    copies, works = SlotCopies(GPU, "test"), [FakeWork(refuse), FakeWork()]
    damaged, fine = (copies.run(lambda work=work: work) for work in works)  # type: ignore[misc]
    for work in works:
        work.finished.set()
    with pytest.raises(RuntimeError, match="damaged"):
        await damaged
    await fine


async def test_a_cpus_copies_run_one_after_the_other_in_another_thread() -> None:
    copies, threads = SlotCopies(CPU, "test"), set[int]()
    running = threading.Lock()

    def copy() -> None:
        assert running.acquire(blocking=False), "two copies at once"
        threads.add(threading.get_ident())
        running.release()

    await asyncio.gather(*(copies.run(copy) for _ in range(20)))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    copies.close()


async def test_closing_waits_for_what_a_gpu_copies() -> None:
    copies, work = SlotCopies(GPU, "test"), FakeWork()
    future = copies.run(lambda: work)
    threading.Timer(0.05, work.finished.set).start()
    copies.close()
    assert work.finished.is_set()
    assert future.done()
