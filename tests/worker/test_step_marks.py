"""Marks of steps: who waits for a layer goes on when it is stored, whichever came first."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from common.worker.step_marks import StepMarks

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture(params=DEVICES)
def marks(request: pytest.FixtureRequest) -> StepMarks:
    return StepMarks(torch.device(request.param))


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_layer_is_awaited_before_its_step_begins() -> None:
    marks = StepMarks(torch.device("cpu"))
    waits = [asyncio.create_task(marks.reached(4, layer)) for layer in (2, 1)]
    await turn()
    marks.begin(4)
    marks.stored()
    await turn()
    assert [wait.done() for wait in waits] == [False, True]
    marks.stored()
    await waits[0]


async def test_steps_are_told_apart(marks: StepMarks) -> None:
    marks.begin(0)
    marks.stored()
    marks.end()
    later = asyncio.create_task(marks.reached(1, 1))
    await marks.reached(0, 1)
    await turn()
    assert not later.done()
    marks.begin(1)
    marks.stored()
    await later
    marks.close()


async def test_end_answers_who_waits_for_layers_that_never_come(marks: StepMarks) -> None:
    waiting = asyncio.create_task(marks.reached(0, 3))
    await turn()
    marks.begin(0)
    marks.stored()
    marks.end()
    await waiting
    marks.close()


async def test_step_replayed_from_a_graph_is_awaited_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells of no layer: all that a GPU can be asked for is what was launched last."""
    recorded: list[FakeEvent] = []

    class FakeEvent:
        def __init__(self) -> None:
            self.is_over = threading.Event()

        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            assert self.is_over.wait(60.0)

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    marks = StepMarks(torch.device("cuda"))
    waits = [asyncio.create_task(marks.reached(0, layer)) for layer in (1, 32)]
    await turn()
    marks.begin(0)
    marks.end()
    assert len(recorded) == 1
    await turn()
    assert not any(wait.done() for wait in waits), "the device has not come so far"
    recorded[0].is_over.set()
    for wait in waits:
        await wait
    marks.close()


async def test_steps_long_over_are_answered_at_once(marks: StepMarks) -> None:
    for step_id in range(20):
        marks.begin(step_id)
        marks.end()
    await marks.reached(0, 1)
    await marks.reached(19, 1)
    marks.close()


async def test_another_thread_tells_and_a_wait_that_is_given_up_leaves_nothing(marks: StepMarks) -> None:
    given_up = asyncio.create_task(marks.reached(7, 1))
    waiting = asyncio.create_task(marks.reached(0, 1))
    await turn()
    given_up.cancel()

    def step() -> None:
        marks.begin(0)
        marks.stored()
        marks.end()

    thread = threading.Thread(target=step)
    thread.start()
    await waiting
    thread.join()
    assert given_up.cancelled()
    assert not marks._waits
    marks.close()


async def test_a_thread_that_cannot_wait_for_events_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would ever be sent again, and nobody would say so."""

    class FailingEvent:
        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    monkeypatch.setattr(torch.cuda, "Event", FailingEvent)
    monkeypatch.setattr(
        "common.worker.step_marks.os._exit", lambda status: loop.call_soon_threadsafe(ended.set_result, status)
    )
    marks = StepMarks(torch.device("cuda"))
    waiting = asyncio.create_task(marks.reached(0, 1))
    await turn()
    marks.begin(0)
    marks.stored()
    assert await asyncio.wait_for(ended, 20) == 1
    waiting.cancel()
