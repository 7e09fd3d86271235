"""Those who say no hello."""

from __future__ import annotations

import asyncio

import pytest

from common.transport.greetings import Greetings
from tests.transport.traffic import until


async def test_one_too_many_ends_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.transport.greetings.MAX_GREETINGS", 2)
    ended: list[int] = []

    async def greet(number: int) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(number)

    greetings = Greetings()
    for number in range(4):
        greetings.start(greet(number))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ended == [0, 1]
    assert len(greetings) == 2
    await greetings.close()
    assert ended == [0, 1, 2, 3]
    assert len(greetings) == 0


async def test_a_greeting_that_is_over_leaves() -> None:
    greetings = Greetings()
    greetings.start(asyncio.sleep(0))
    await until(lambda: len(greetings) == 0)
