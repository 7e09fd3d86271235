"""Results leave in the order of launches, and a failure is told behind them and wakes the launching thread."""

from __future__ import annotations

import threading

import msgspec

from common.errors import InternalError
from common.worker.rank_messages import RankFailed
from common.worker.result_thread import ResultThread
from common.worker.step_plan import StepResult


class Step:
    """A launched step that is done when the test says so."""

    def __init__(self, step_id: int, error: Exception | None = None) -> None:
        self.done = threading.Event()
        self._step_id = step_id
        self._error = error

    def result(self) -> StepResult:
        assert self.done.wait(10)
        if self._error is not None:
            raise self._error
        return StepResult(self._step_id, [], 1)


class Channel:
    """The front's end."""

    def __init__(self) -> None:
        self.messages: list[msgspec.Struct] = []
        self.interrupted = threading.Event()
        self.is_gone = False

    def send(self, message: msgspec.Struct) -> None:
        if self.is_gone:
            raise BrokenPipeError
        self.messages.append(message)

    def open(self, sends_results: bool = True) -> ResultThread:
        return ResultThread(3, sends_results, self.send, self.interrupted.set)


def finished(step_id: int, error: Exception | None = None) -> Step:
    step = Step(step_id, error)
    step.done.set()
    return step


def test_results_are_sent_in_the_order_of_launches() -> None:
    channel = Channel()
    results = channel.open()
    first, second = Step(1), finished(2)
    results.put(first)
    results.put(second)
    first.done.set()
    assert results.close()
    assert channel.messages == [StepResult(1, [], 1), StepResult(2, [], 1)]
    assert not channel.interrupted.is_set()


def test_only_one_rank_sends_results_but_all_await_them() -> None:
    channel = Channel()
    results = channel.open(sends_results=False)
    results.put(finished(1))
    results.put(finished(2, InternalError("wrong")))
    assert not results.close()
    assert channel.messages == [RankFailed(3, "InternalError", "wrong")]


def test_a_step_that_fails_wakes_the_launching_thread() -> None:
    channel = Channel()
    results = channel.open()
    for step in (finished(1), finished(2, RuntimeError("device")), finished(3)):
        results.put(step)
    assert channel.interrupted.wait(10)
    assert not results.close()
    assert channel.messages == [StepResult(1, [], 1), RankFailed(3, "RuntimeError", "device")]


def test_a_failure_of_the_launching_thread_is_told_behind_the_results_before_it() -> None:
    channel = Channel()
    results = channel.open()
    step = Step(1)
    results.put(step)
    results.fail(InternalError("row 0 is taken"))
    step.done.set()
    assert not results.close()
    assert channel.messages == [StepResult(1, [], 1), RankFailed(3, "InternalError", "row 0 is taken")]


def test_a_front_that_is_gone_is_no_failure() -> None:
    channel = Channel()
    channel.is_gone = True
    results = channel.open()
    results.put(finished(1))
    assert channel.interrupted.wait(10)
    assert results.close()
