"""The router's sessions with decode workers: what is not answered, what does not fit, and what breaks meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
from baton.v1 import decode_pb2, inference_pb2, kv_pb2

from common.errors import InvalidArgument, Unavailable
from services.router import decode_session
from services.router.decode_session import DecodeSession
from services.router.worker_list import Role
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import letters


def request(num_tokens: int = 6) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello")
    made.sampling.max_tokens = num_tokens
    return made


def session_of(cluster: Cluster) -> DecodeSession:
    """With the first decode worker."""
    return cluster.router.registry.worker(Role.DECODE, cluster.decodes[0].address).session


def open_request(sequence_id: int, num_tokens: int = 5) -> decode_pb2.SessionRequest:
    sequence = kv_pb2.Sequence(
        sequence_id=sequence_id, token_ids=range(1, num_tokens + 1), num_prompt_tokens=num_tokens
    )
    return decode_pb2.SessionRequest(open=decode_pb2.OpenRequest(sequence=sequence, ticket_id=sequence_id))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path, num_decodes=2) as running:
        yield running


async def test_a_worker_that_does_not_answer_an_open_is_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_patiently = DecodeSession.open

    def open_in_haste(session: DecodeSession, opening: decode_pb2.SessionRequest) -> Awaitable[decode_pb2.OpenResponse]:
        monkeypatch.undo()  # the limit of this one stands; the next one is answered, however long that takes
        return open_patiently(session, opening)

    monkeypatch.setattr(decode_session, "OPEN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(DecodeSession, "open", open_in_haste)
    cluster.script.num_opens_ignored = 1
    outputs = await cluster.generate(request())
    assert outputs[0].token_ids == letters(0, 6)
    assert outputs[0].last is not None
    assert outputs[0].last.lifetime.num_migrations == 1
    assert [len(decode.opened) for decode in cluster.decodes] == [1, 1]
    await cluster.wait_all_closed()


async def test_a_worker_whose_ranks_are_gone_by_now_is_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_ticket = DecodeSession.new_ticket

    def refuse_once(session: DecodeSession) -> kv_pb2.Ticket:
        monkeypatch.setattr(DecodeSession, "new_ticket", new_ticket)
        raise Unavailable("no ranks")

    monkeypatch.setattr(DecodeSession, "new_ticket", refuse_once)
    outputs = await cluster.generate(request())
    assert outputs[0].token_ids == letters(0, 6)
    assert outputs[0].last is not None
    assert outputs[0].last.lifetime.num_migrations == 1
    await cluster.wait_all_closed()


async def test_a_session_that_breaks_during_an_open_fails_it(cluster: Cluster) -> None:
    session = session_of(cluster)
    cluster.script.num_opens_ignored = 1
    opening = asyncio.ensure_future(session.open(open_request(7)))
    await asyncio.wait_for(cluster.decodes[0].open_seen.wait(), 20)
    cluster.decodes[0].break_streams()
    with pytest.raises(Unavailable, match="broke"):
        await opening
    await cluster.wait_until(lambda: session.stands)  # it comes back by itself


async def test_a_cancelled_open_leaves_nothing_waiting_and_may_be_closed(cluster: Cluster) -> None:
    session = session_of(cluster)
    opening = asyncio.ensure_future(session.open(open_request(7)))
    await asyncio.sleep(0)
    opening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await opening
    session.close(7)
    await asyncio.wait_for(cluster.decodes[0].close_seen.wait(), 20)
    assert not cluster.decodes[0].open
    assert not (await session.open(open_request(8))).HasField("error")


async def test_a_sequence_too_large_for_a_message_is_refused_and_the_session_stands(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, max_message_bytes=1 << 16) as cluster:
        session = session_of(cluster)
        with pytest.raises(InvalidArgument, match="prompt"):
            await session.open(open_request(1, num_tokens=1 << 16))
        assert (await session.open(open_request(2))).sequence_id == 2
        assert len(cluster.decodes[0].opened) == 1


@pytest.mark.parametrize("num_too_many", [1, 3])  # one is gone again when the writer wakes before the reader
async def test_a_worker_that_does_not_read_counts_as_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, num_too_many: int
) -> None:
    monkeypatch.setattr(decode_session, "MAX_OUTGOING", 3)
    session = session_of(cluster)
    cluster.script.num_opens_ignored = 1
    opening = asyncio.ensure_future(session.open(open_request(1)))
    await asyncio.wait_for(cluster.decodes[0].open_seen.wait(), 20)
    for sequence_id in range(2, 2 + 3 + num_too_many):  # nothing can be written before this task waits
        session.close(sequence_id)
    with pytest.raises(Unavailable):
        await opening
    await cluster.wait_until(lambda: session.stands)
