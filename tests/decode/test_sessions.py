"""Token streams of routers: merging, replacing, and giving up on one that does not read."""

from __future__ import annotations

import asyncio

import pytest
from baton.v1 import decode_pb2, kv_pb2

from common.awake_clock import TICK_S
from common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from common.rpc.status import to_status
from services.decode.request import End, SequenceEnded, TokenSampled
from services.decode.sessions import Sessions
from tests.decode.front import Prefill, Router, running_front, ship


def token(sequence_id: int, position: int, token_id: int, session_id: str = "router") -> TokenSampled:
    return TokenSampled((session_id, sequence_id), position, token_id, None, [])


def end(sequence_id: int, how: End) -> SequenceEnded:
    return SequenceEnded(("router", sequence_id), 0, how, 0, "", 11, 22)


async def test_the_first_batch_is_empty_and_each_step_makes_one() -> None:
    sessions = Sessions(max_pending=8)
    responses = sessions.begin("router").responses()
    assert await anext(responses) == decode_pb2.SessionResponse()
    for sequence_id in (1, 2):
        sessions.publish(token(sequence_id, 1, 5))
    sessions.flush()
    response = await anext(responses)
    assert [(entry.sequence_id, list(entry.token_ids)) for entry in response.sequences] == [(1, [5]), (2, [5])]


async def test_what_a_slow_router_missed_is_merged_by_sequence() -> None:
    sessions = Sessions(max_pending=8)
    responses = sessions.begin("router").responses()
    await anext(responses)
    for position in (4, 5, 6):
        sessions.publish(token(1, position, position * 10))
        sessions.flush()
    sessions.publish(end(1, End.FINISHED))
    sessions.flush()
    (entry,) = (await anext(responses)).sequences
    assert (entry.first_position, list(entry.token_ids)) == (4, [40, 50, 60])
    assert (entry.end, entry.decode_queue_ns, entry.decode_ns) == (decode_pb2.SEQUENCE_END_FINISHED, 11, 22)


async def test_logprobs_come_one_for_each_token() -> None:
    sessions = Sessions(max_pending=8)
    responses = sessions.begin("router").responses()
    await anext(responses)
    sessions.publish(TokenSampled(("router", 1), 1, 5, -0.5, [(5, -0.5), (6, -1.5)]))
    sessions.flush()
    (entry,) = (await anext(responses)).sequences
    assert (entry.logprobs[0].chosen.token_id, entry.logprobs[0].chosen.logprob) == (5, -0.5)
    assert [top.token_id for top in entry.logprobs[0].top] == [5, 6]


async def test_tokens_go_to_their_own_router_only() -> None:
    sessions = Sessions(max_pending=8)
    mine, other = (sessions.begin(name).responses() for name in ("router", "other"))
    await anext(mine)
    await anext(other)
    sessions.publish(token(1, 1, 5, session_id="other"))
    sessions.publish(token(2, 1, 6))
    sessions.flush()
    assert [entry.sequence_id for entry in (await anext(mine)).sequences] == [2]
    assert [entry.sequence_id for entry in (await anext(other)).sequences] == [1]


async def test_whoever_closed_a_sequence_is_not_told() -> None:
    sessions = Sessions(max_pending=8)
    responses = sessions.begin("router").responses()
    await anext(responses)
    sessions.publish(end(1, End.CLOSED))
    sessions.publish(end(2, End.LOST))
    sessions.flush()
    assert [entry.sequence_id for entry in (await anext(responses)).sequences] == [2]


async def test_a_router_that_does_not_read_loses_its_stream() -> None:
    sessions = Sessions(max_pending=2)
    responses = sessions.begin("router").responses()
    await anext(responses)
    for sequence_id in range(3):
        sessions.publish(token(sequence_id, 1, 5))
    sessions.flush()
    with pytest.raises(ResourceExhausted):
        await anext(responses)


async def test_answers_that_nobody_reads_end_the_stream_too() -> None:
    sessions = Sessions(max_pending=2)
    session = sessions.begin("router")
    responses = session.responses()
    await anext(responses)
    for sequence_id in (1, 2):
        session.answer(decode_pb2.OpenResponse(sequence_id=sequence_id))
    assert [answer.sequence_id for answer in (await anext(responses)).opened] == [1, 2]
    for sequence_id in (3, 4, 5):
        session.answer(decode_pb2.OpenResponse(sequence_id=sequence_id))
    with pytest.raises(ResourceExhausted):
        await anext(responses)


async def test_a_beat_is_answered_after_the_opens_before_it() -> None:
    sessions = Sessions(max_pending=200)
    session = sessions.begin("router", beats=True)
    responses = session.responses()
    await anext(responses)
    for sequence_id in range(100):
        session.answer(decode_pb2.OpenResponse(sequence_id=sequence_id))
    session.answer_beat(1)
    first, second = await anext(responses), await anext(responses)
    assert (len(first.opened), len(second.opened)) == (64, 36)
    assert (first.HasField("beat"), second.beat) == (False, 1)


async def test_opens_that_are_refused_in_a_rush_do_not_end_the_session() -> None:
    sessions = Sessions(max_pending=2)
    session = sessions.begin("router")
    responses = session.responses()
    await anext(responses)
    error = to_status(ResourceExhausted("2 sequences are open on this worker"))
    for sequence_id in range(300):
        session.answer(decode_pb2.OpenResponse(sequence_id=sequence_id, error=error))
    answered: list[int] = []
    while len(answered) < 300:
        response = await anext(responses)
        assert response.ByteSize() < 1 << 16  # the lowest limit that a router can be given
        answered += [answer.sequence_id for answer in response.opened]
    assert answered == list(range(300))
    assert not session.is_over


async def test_what_waits_for_a_router_that_stands_still_comes_in_small_messages() -> None:
    num_sequences, num_steps, top = 64, 40, [(100_000 + index, -2.0) for index in range(20)]
    sessions = Sessions(max_pending=num_sequences)
    session = sessions.begin("router")
    responses = session.responses()
    await anext(responses)
    session.answer(decode_pb2.OpenResponse(sequence_id=num_sequences))
    for position in range(num_steps):
        for sequence_id in range(num_sequences):
            sessions.publish(TokenSampled(("router", sequence_id), position, position * 1000, -1.0, top))
        sessions.flush()
    for sequence_id in range(num_sequences):
        sessions.publish(end(sequence_id, End.FINISHED))
    sessions.flush()
    tokens: dict[int, list[int]] = {sequence_id: [] for sequence_id in range(num_sequences)}
    ended: set[int] = set()
    opened: list[int] = []
    while len(ended) < num_sequences:
        response = await anext(responses)
        assert response.ByteSize() < 1 << 16  # the lowest limit that a router can be given
        opened += [answer.sequence_id for answer in response.opened]
        for entry in response.sequences:
            assert entry.sequence_id not in ended
            assert not entry.token_ids or entry.first_position == len(tokens[entry.sequence_id])
            assert [logprobs.chosen.token_id for logprobs in entry.logprobs] == entry.token_ids
            tokens[entry.sequence_id] += entry.token_ids
            if entry.end:
                ended.add(entry.sequence_id)
    assert opened == [num_sequences]
    assert all(ids == [position * 1000 for position in range(num_steps)] for ids in tokens.values())


async def test_tokens_of_one_sequence_are_not_too_much_for_a_message_either() -> None:
    sessions = Sessions(max_pending=8)
    responses = sessions.begin("router").responses()
    await anext(responses)
    for position in range(20_000):
        sessions.publish(token(1, position, 2**32 - 1))
    sessions.flush()
    num_tokens = 0
    while num_tokens < 20_000:
        (entry,) = (response := await anext(responses)).sequences
        assert response.ByteSize() < 1 << 16
        assert entry.first_position == num_tokens
        num_tokens += len(entry.token_ids)


async def test_a_router_that_stands_still_for_too_long_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.decode.sessions.MAX_MESSAGE_TOKEN_BYTES", 10)  # two tokens
    monkeypatch.setattr("services.decode.sessions.MAX_FULL_MESSAGES", 3)
    sessions = Sessions(max_pending=8)
    session = sessions.begin("router")
    responses = session.responses()
    await anext(responses)
    for position in range(8):
        sessions.publish(token(1, position, 5))
        sessions.flush()
    assert not session.is_over
    sessions.publish(token(1, 8, 5))
    sessions.flush()
    with pytest.raises(ResourceExhausted):
        await anext(responses)


def pass_by(sessions: Sessions, start_s: float, seconds: float) -> float:
    """Tick by tick; returns what time it is then."""
    for index in range(1, round(seconds / TICK_S) + 1):
        sessions.look(start_s + index * TICK_S)
    return start_s + seconds


async def test_a_router_that_promised_signs_of_life_and_gives_none_loses_its_stream() -> None:
    sessions, now_s = Sessions(max_pending=8), 1e9
    sessions.look(now_s)
    silent, beating, old = (sessions.begin(name, beats) for name, beats in (("a", True), ("b", True), ("c", False)))
    for _ in range(3):
        now_s = pass_by(sessions, now_s, 1.5)
        beating.heard()
    assert [session.is_over for session in (silent, beating, old)] == [True, False, False]
    with pytest.raises(Unavailable, match="nothing was heard"):
        raise await silent.wait_over()


async def test_a_worker_that_was_stopped_itself_gives_no_router_up() -> None:
    sessions = Sessions(max_pending=8)
    session = sessions.begin("router", beats=True)
    for hour in range(5):
        sessions.look(1e9 + 3600.0 * hour)
    assert not session.is_over


async def test_a_sign_of_life_is_answered_with_the_next_message() -> None:
    sessions = Sessions(max_pending=8)
    session = sessions.begin("router", beats=True)
    responses = session.responses()
    assert await anext(responses) == decode_pb2.SessionResponse(beat=0)
    session.answer_beat(7)
    assert await anext(responses) == decode_pb2.SessionResponse(beat=7)
    session.answer_beat(8)
    sessions.publish(token(1, 1, 5))
    sessions.flush()
    response = await anext(responses)
    assert (response.beat, len(response.sequences)) == (8, 1)
    sessions.publish(token(1, 2, 5))
    sessions.flush()
    assert not (await anext(responses)).HasField("beat")


async def test_a_session_needs_a_name() -> None:
    with pytest.raises(InvalidArgument, match="session_id"):
        Sessions(max_pending=2).begin("")


async def test_a_second_stream_replaces_the_first_whose_sequences_are_lost() -> None:
    async with running_front() as front:
        first = await Router(front).subscribed()
        prefill = Prefill(front, first.open(1))
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, 2)
        second = await Router(front).subscribed()
        assert await second.end_of(1) == "LOST"
        with pytest.raises(Unavailable):
            await prefill.over()
        second.open(2)
        await first.leave()
        await asyncio.sleep(0)
        assert front.worker.scheduler.num_open == 1, "the end of the replaced stream closed what is not its own"
        await second.leave()
        await front.until_free()


async def test_a_sequence_needs_a_stream() -> None:
    async with running_front() as front:
        router = Router(front)
        with pytest.raises(FailedPrecondition):
            router.open(1)
        await router.subscribed()
        router.open(1)
        await router.leave()
        await front.until_free()


async def test_what_tickets_say_comes_first_and_again_when_it_changes() -> None:
    sessions = Sessions(max_pending=4)
    early = sessions.begin("early").responses()
    assert not (await anext(early)).HasField("tickets"), "there are no ranks yet"
    sessions.tell_tickets(kv_pb2.Ticket(rank_addresses=["a"]))
    assert list((await anext(early)).tickets.rank_addresses) == ["a"]
    late = sessions.begin("late").responses()
    assert list((await anext(late)).tickets.rank_addresses) == ["a"]
    sessions.tell_tickets(kv_pb2.Ticket())  # the ranks are gone
    for responses in (early, late):
        response = await anext(responses)
        assert response.HasField("tickets")
        assert not response.tickets.rank_addresses
