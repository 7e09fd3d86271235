"""An OpenAI-compatible server as a target: what is asked for, what is counted, how failures are named. Over HTTP."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import (
    BatonError,
    InternalError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from loadtest.targets.base import Account, ModelInfo, TargetSpec
from loadtest.targets.openai import open_openai
from tests.loadtest.fake_openai import FakeOpenAI, serving


def _spec(fake: FakeOpenAI, model: str = "") -> TargetSpec:
    return TargetSpec("openai", fake.address, model, vocab_size=900)


async def _generate(fake: FakeOpenAI, max_tokens: int = 5) -> tuple[Account, int]:
    counts: list[int] = []
    async with serving(fake), open_openai(_spec(fake)) as target:
        await target.describe()
        account = await target.generate(target.prepare("load-1", [5, 6, 7], max_tokens), 30.0, counts.append)
    return account, sum(counts)


@pytest.mark.parametrize("counts_tokens", [True, False])
async def test_every_token_is_counted_whether_or_not_the_server_counts(counts_tokens: bool) -> None:
    assert await _generate(FakeOpenAI(counts_tokens=counts_tokens)) == (Account(num_cached_tokens=16), 5)


async def test_a_request_asks_for_exactly_so_many_greedy_tokens_as_token_ids() -> None:
    fake = FakeOpenAI()
    await _generate(fake)
    (body,) = fake.bodies
    assert body["prompt"] == [5, 6, 7]
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["temperature"]) == (5, 5, True, 0.0)
    assert (body["stream"], body["model"]) == (True, "fake")


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_the_model_is_described_whatever_the_form_of_the_url(suffix: str) -> None:
    fake = FakeOpenAI()
    async with serving(fake), open_openai(TargetSpec("openai", fake.address + suffix, vocab_size=900)) as target:
        assert await target.describe() == ModelInfo("fake", 900, 512)


async def test_another_model_can_be_asked_for_but_not_an_unknown_one() -> None:
    async with serving(FakeOpenAI(max_model_len=None)) as fake:
        async with open_openai(_spec(fake, "other")) as target:
            assert (await target.describe()).name == "other"
        async with open_openai(_spec(fake, "none")) as target:
            with pytest.raises(NotFound, match="'none'"):
                await target.describe()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidArgument),
        (404, NotFound),
        (422, InvalidArgument),
        (429, ResourceExhausted),
        (500, InternalError),
        (503, Unavailable),
    ],
)
async def test_a_status_goes_by_its_name(status: int, error: type[BatonError]) -> None:
    with pytest.raises(error, match="not now"):
        await _generate(FakeOpenAI(status=status))


@pytest.mark.parametrize(
    ("fault", "error", "named"),
    [
        ("reset", Unavailable, "Client"),
        ("end", Unavailable, "DONE"),
        ("error", InternalError, "out of memory"),
        ("garbage", InternalError, "not json"),
    ],
)
async def test_a_stream_that_fails_in_the_middle_goes_by_its_name(
    fault: str, error: type[BatonError], named: str
) -> None:
    with pytest.raises(error, match=named):
        await _generate(FakeOpenAI(fault=fault))


async def test_cancelling_leaves_the_stream() -> None:
    fake = FakeOpenAI(fault="stall")
    counts: list[int] = []
    have_come = asyncio.Event()

    def count(num_tokens: int) -> None:
        counts.append(num_tokens)
        if sum(counts) == 2:
            have_come.set()

    async with serving(fake), open_openai(_spec(fake)) as target:
        generating = asyncio.create_task(target.generate(target.prepare("a", [1], 5), 30.0, count))
        async with asyncio.timeout(20.0):
            await asyncio.gather(have_come.wait(), fake.stalled.wait())
            generating.cancel()
            await fake.gone.wait()
        with pytest.raises(asyncio.CancelledError):
            await generating
    assert sum(counts) == 2


async def test_nobody_there_is_unavailable() -> None:
    async with open_openai(TargetSpec("openai", "http://127.0.0.1:9", vocab_size=900)) as target:
        with pytest.raises(Unavailable):
            await target.describe()
        with pytest.raises(Unavailable):
            await target.generate(target.prepare("a", [1], 5), 30.0, lambda count: None)


async def test_a_url_that_is_none_is_unavailable() -> None:
    async with open_openai(TargetSpec("openai", "http://[bad", vocab_size=900)) as target:
        with pytest.raises(Unavailable):
            await target.describe()
