"""When beats of a session are due, and when their answers are missed."""

from __future__ import annotations

from baton.v1 import decode_pb2

from services.router.session_beats import BEGIN_TIMEOUT_S, INTERVAL_S, SILENT_AFTER_S, SessionBeats

TICK_S = 0.25


def answer(number: int) -> decode_pb2.SessionResponse:
    return decode_pb2.SessionResponse(beat=number)


def test_a_worker_of_before_there_were_beats_stands_at_once_and_is_never_silent() -> None:
    beats = SessionBeats(10.0)
    assert not beats.are_answered
    beats.take(decode_pb2.SessionResponse(), 10.5)
    assert beats.are_answered
    assert beats.next_number(1000.0) == 0
    assert not beats.is_silent(1000.0)


def test_a_stream_stands_once_its_first_beat_came_back() -> None:
    beats = SessionBeats(10.0)
    assert beats.next_number(10.0) == 0, "nothing is known of the worker"
    beats.take(answer(0), 10.5)
    assert not beats.are_answered
    assert beats.next_number(10.5) == 1
    beats.take(decode_pb2.SessionResponse(), 10.6)
    assert not beats.are_answered
    beats.take(answer(1), 10.7)
    assert beats.are_answered


def test_beats_go_out_every_second_and_an_answer_settles_those_before_it() -> None:
    beats = SessionBeats(0.0)
    beats.take(answer(0), 0.0)
    sent = [number for tick in range(11) if (number := beats.next_number(tick * TICK_S))]
    assert sent == [1, 2, 3]
    assert INTERVAL_S == 1.0
    beats.take(answer(3), 2.5)
    assert not beats.is_silent(2.5 + 10.0)
    beats.take(answer(99), 2.5)  # what was never asked
    assert beats.next_number(3.0) == 4
    assert beats.is_silent(3.0 + SILENT_AFTER_S + TICK_S)


def test_a_missed_answer_is_silence_after_three_seconds() -> None:
    beats = SessionBeats(0.0)
    beats.take(answer(0), 0.0)
    assert beats.next_number(0.0) == 1
    assert beats.next_number(1.0) == 2
    assert not beats.is_silent(SILENT_AFTER_S)
    assert beats.is_silent(SILENT_AFTER_S + TICK_S)


def test_a_stream_that_never_begins_is_given_up() -> None:
    beats = SessionBeats(7.0)
    assert not beats.is_silent(7.0 + BEGIN_TIMEOUT_S)
    assert beats.is_silent(7.0 + BEGIN_TIMEOUT_S + TICK_S)


def test_a_beat_behind_many_opens_waits_for_its_turn_while_they_are_answered() -> None:
    beats = SessionBeats(0.0)
    beats.take(answer(0), 0.0)
    assert beats.next_number(0.0) == 1
    for number in range(1, 11):
        now_s = float(number)
        assert not beats.is_silent(now_s)
        beats.take(decode_pb2.SessionResponse(opened=[decode_pb2.OpenResponse(sequence_id=number)]), now_s)
    assert not beats.is_silent(10.0 + SILENT_AFTER_S)
    assert beats.is_silent(10.0 + SILENT_AFTER_S + TICK_S)


def test_tokens_are_no_answer() -> None:
    """The end that sends them may work while the one that reads is wedged."""
    beats = SessionBeats(0.0)
    beats.take(answer(0), 0.0)
    assert beats.next_number(0.0) == 1
    tokens = decode_pb2.SequenceTokens(sequence_id=1, token_ids=[1])
    beats.take(decode_pb2.SessionResponse(sequences=[tokens]), SILENT_AFTER_S)
    assert beats.is_silent(SILENT_AFTER_S + TICK_S)


def test_an_open_is_passed_over_once_a_later_beat_is_answered() -> None:
    beats = SessionBeats(0.0)
    assert beats.is_passed_over(beats.num_sent), "a worker that answers no beats has only its time"
    beats.take(answer(0), 0.0)
    assert beats.next_number(0.0) == 1
    num_before = beats.num_sent
    beats.take(answer(1), 0.5)
    assert not beats.is_passed_over(num_before)
    assert beats.next_number(1.0) == 2
    beats.take(answer(2), 1.5)
    assert beats.is_passed_over(num_before)
