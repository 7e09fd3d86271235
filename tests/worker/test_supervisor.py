"""Starting ranks, starting them again, and giving up."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from common.errors import BatonError, ModelError, Unavailable
from common.worker.rank_group import RankGroup
from common.worker.supervisor import Backoff, RankSupervisor


class _Group(RankGroup):
    """A group without processes."""

    def __init__(self, log: list[str], name: str) -> None:
        super().__init__()
        self._log = log
        self.name = name

    def die(self, reason: str) -> None:
        self.lose(reason)

    async def stop(self, grace_s: float) -> None:
        self._log.append(f"stop {self.name}")


class _Owner:
    """Starts groups from a script: an error, or the name of a group. Delays are recorded, not waited for."""

    def __init__(self, *script: str | BatonError, backoff: Backoff = Backoff(1.0, 4.0, 5)) -> None:  # noqa: B008
        self.log: list[str] = []
        self.ready: asyncio.Queue[_Group] = asyncio.Queue()
        self._script = deque(script)
        self.supervisor = RankSupervisor(self._start, self._on_ready, self._on_lost, backoff, sleep=self._sleep)

    async def _start(self) -> RankGroup:
        step = self._script.popleft()
        if isinstance(step, BatonError):
            raise step
        return _Group(self.log, step)

    def _on_ready(self, group: RankGroup) -> None:
        assert isinstance(group, _Group)
        self.log.append(f"ready {group.name}")
        self.ready.put_nowait(group)

    def _on_lost(self, reason: str) -> None:
        self.log.append(f"lost: {reason}")

    async def _sleep(self, delay_s: float) -> None:
        self.log.append(f"wait {delay_s:g}")


async def test_a_lost_group_is_reported_stopped_and_replaced() -> None:
    owner = _Owner("a", "b")
    running = asyncio.create_task(owner.supervisor.run())
    (await owner.ready.get()).die("rank 1 died")
    await owner.ready.get()
    assert owner.log == ["ready a", "lost: rank 1 died", "stop a", "ready b"]
    assert owner.supervisor.num_restarts == 1
    running.cancel()
    await asyncio.wait({running})
    assert owner.log[-1] == "stop b", "no process outlives the supervisor"


async def test_a_checkpoint_that_cannot_be_served_is_fatal_at_the_first_start() -> None:
    owner = _Owner(ModelError("quantization 'awq' is not supported"))
    with pytest.raises(ModelError, match="awq"):
        await owner.supervisor.run()
    assert owner.log == []


async def test_a_start_that_dies_is_tried_again_with_growing_delays() -> None:
    owner = _Owner(Unavailable("died"), Unavailable("died"), Unavailable("died"), Unavailable("died"), "a")
    running = asyncio.create_task(owner.supervisor.run())
    await owner.ready.get()
    assert owner.log == ["wait 1", "wait 2", "wait 4", "wait 4", "ready a"]
    running.cancel()
    await asyncio.wait({running})


async def test_too_many_failed_starts_end_the_worker() -> None:
    owner = _Owner(*[Unavailable("died")] * 5)
    with pytest.raises(Unavailable, match="died"):
        await owner.supervisor.run()


async def test_a_model_error_after_the_first_start_is_not_fatal() -> None:
    """The files may be on their way: a mounted volume that is being replaced."""
    owner = _Owner("a", ModelError("model.safetensors is cut short"), "b")
    running = asyncio.create_task(owner.supervisor.run())
    (await owner.ready.get()).die("rank 0 died")
    await owner.ready.get()
    assert owner.log[-1] == "ready b"
    running.cancel()
    await asyncio.wait({running})


async def test_groups_that_die_as_soon_as_they_stand_do_not_restart_for_ever() -> None:
    owner = _Owner(*"abcde")
    running = asyncio.create_task(owner.supervisor.run())
    for _ in range(5):
        (await owner.ready.get()).die("rank 0 died")
    with pytest.raises(Unavailable, match="5 times in a row"):
        await running
    assert [line for line in owner.log if line.startswith("wait")] == ["wait 1", "wait 2", "wait 4"]


async def test_a_worker_that_served_is_not_ended_by_what_ends_its_ranks() -> None:
    owner = _Owner(*"abcdefghijkl", Unavailable("died"), "m")
    running = asyncio.create_task(owner.supervisor.run())
    for number in range(12):
        group = await owner.ready.get()
        group.has_served = number == 3  # and never again
        group.die("rank 0 was ended by SIGABRT")
    await owner.ready.get()
    assert not running.done()
    waits = [line for line in owner.log if line.startswith("wait")]
    assert waits == ["wait 1", "wait 2", *["wait 4"] * 9, "wait 1"], (
        "ever more slowly; a failed start counts for itself"
    )
    running.cancel()
    await asyncio.wait({running})
