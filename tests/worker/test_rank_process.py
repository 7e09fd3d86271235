"""The step loops of ranks: a GPU's launches as plans arrive, results follow in order, failures and fronts end them."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from common.errors import InternalError
from common.worker.framing import BlockingFrames
from common.worker.model_runner import Pending
from common.worker.rank_messages import RankFailed, RankStepMessage
from common.worker.rank_process import _launch_loop, _step_loop
from common.worker.rank_runtime import RankRuntime
from common.worker.step_plan import AddRow, RemoveRow, StepPlan, StepResult

_decoder: msgspec.msgpack.Decoder[RankStepMessage] = msgspec.msgpack.Decoder(RankStepMessage)


@dataclass
class Step:
    step_id: int
    may_end: threading.Event

    def result(self) -> StepResult:
        assert self.may_end.wait(10)
        if self.step_id < 0:
            raise InternalError("the device failed")
        return StepResult(self.step_id, [], 1)


@dataclass
class Device:
    """A runner whose steps end when the test lets them."""

    launched: list[int] = field(default_factory=list)
    second_launched: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def add_row(self, message: AddRow) -> None: ...

    def remove_row(self, row: int) -> None:
        raise InternalError(f"row {row} is not taken")

    def launch(self, plan: StepPlan) -> Pending:
        self.launched.append(plan.step_id)
        if len(self.launched) == 2:
            self.second_launched.set()
        return Step(plan.step_id, self.may_end)


class Rank:
    """`_launch_loop` in a thread, and the front's end of its channel."""

    def __init__(self, rank: int = 0) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        self.device = Device()
        self.front = BlockingFrames(ours)
        self.socket = ours
        self.status: int | None = None
        runtime = cast(RankRuntime, SimpleNamespace(runner=self.device))

        def body() -> None:
            with theirs:
                self.status = _launch_loop(BlockingFrames(theirs), theirs, rank, runtime)

        self.thread = threading.Thread(target=body)
        self.thread.start()

    def receive(self) -> RankStepMessage:
        frame = self.front.receive()
        assert frame is not None
        return _decoder.decode(frame)

    def ended(self) -> int | None:
        self.thread.join(10)
        return self.status

    def close(self) -> None:
        self.device.may_end.set()
        self.socket.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.close()


def test_a_step_is_launched_while_the_one_before_runs(rank: Rank) -> None:
    rank.front.send(StepPlan(1, []))
    rank.front.send(StepPlan(2, []))
    assert rank.device.second_launched.wait(10)
    rank.device.may_end.set()
    assert [rank.receive(), rank.receive()] == [StepResult(1, [], 1), StepResult(2, [], 1)]
    rank.socket.shutdown(socket.SHUT_WR)
    assert rank.ended() == 0


def test_a_message_that_cannot_be_obeyed_is_told_behind_the_results(rank: Rank) -> None:
    rank.front.send(StepPlan(1, []))
    rank.front.send(RemoveRow(4))
    rank.device.may_end.set()
    assert rank.receive() == StepResult(1, [], 1)
    assert rank.receive() == RankFailed(0, "InternalError", "row 4 is not taken")
    assert rank.ended() == 1


def test_a_step_that_fails_on_the_device_ends_the_rank_though_no_message_comes(rank: Rank) -> None:
    rank.front.send(StepPlan(-1, []))
    rank.device.may_end.set()
    assert rank.receive() == RankFailed(0, "InternalError", "the device failed")
    assert rank.ended() == 1


def test_other_ranks_than_the_first_send_no_results() -> None:
    rank = Rank(rank=1)
    rank.device.may_end.set()
    rank.front.send(StepPlan(1, []))
    rank.front.send(RemoveRow(4))
    assert rank.receive() == RankFailed(1, "InternalError", "row 4 is not taken")
    rank.close()


def test_a_front_that_closes_with_a_result_unread_ends_the_rank() -> None:
    front, theirs = socket.socketpair()
    BlockingFrames(front).send(StepPlan(1, []))
    statuses: list[int] = []
    device = Device()
    device.may_end.set()
    runtime = cast(RankRuntime, SimpleNamespace(runner=device))
    thread = threading.Thread(target=lambda: statuses.append(_step_loop(BlockingFrames(theirs), 0, runtime)))
    with theirs:
        thread.start()
        readable, _, _ = select.select([front], [], [], 30)
        front.close()
        thread.join(30)
    assert readable
    assert statuses == [0]
