"""Ranks that do not answer on their KV channel are declared lost, whatever they do otherwise."""

from __future__ import annotations

import asyncio

import pytest

from common.worker import kv_watchdog
from common.worker.kv_watchdog import watch_kv_threads
from common.worker.rank_group import RankGroup
from tests.decode.fake_group import FakeGroup


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


async def test_ranks_that_answer_are_left_alone_and_nothing_stays_open() -> None:
    group = FakeGroup(tp_size=2)
    num_rounds = 0

    async def lose_in_the_fourth_round(seconds: float) -> None:
        nonlocal num_rounds
        assert seconds == 1.25
        assert (group.lost_reason, group.num_operations) == (None, 0)
        num_rounds += 1
        if num_rounds == 4:
            group.lose("over")

    await asyncio.wait_for(watch_kv_threads(group, 5.0, lose_in_the_fourth_round), 5)
    assert group.num_pings >= 3 * 2


async def test_a_rank_that_answers_when_asked_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front may have stood still, and not the rank."""
    group, answers, asked = FakeGroup(), [False, True, False, False], []

    async def all_answer(_: RankGroup, timeout_s: float) -> bool:
        asked.append(timeout_s)
        assert group.lost_reason is None
        return answers.pop(0)

    monkeypatch.setattr(kv_watchdog, "_all_answer", all_answer)
    await asyncio.wait_for(watch_kv_threads(group, 4.0, no_sleep), 5)
    assert asked == [4.0, 1.0, 4.0, 1.0]
    assert group.lost_reason is not None


async def test_a_rank_that_does_not_answer_ends_the_group() -> None:
    group = FakeGroup()
    group.kv_hangs = True
    await asyncio.wait_for(watch_kv_threads(group, 0.01, no_sleep), 5)
    assert group.lost_reason == "the ranks hang: no answer on a KV channel within 0.01 s"
    assert group.num_operations == 0
