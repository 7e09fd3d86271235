"""Tokens in, messages out: whatever the cuts, the client gets the same text, tokens and reason."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from baton.v1 import decode_pb2, inference_pb2, prefill_pb2, sampling_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.choice import Choice, ChoiceLimits
from services.router.output_stream import OutputStream
from services.router.sequence_receiver import FirstToken, SequenceReceiver
from services.router.tokenizer import Tokenizer
from tests.router.byte_checkpoint import EOS_TOKEN_ID, byte_ids, write_byte_checkpoint
from tests.router.sample_tokenizers import byte_level, metaspace, save, sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_byte_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def make_choice(tokenizer: Tokenizer, max_tokens: int = 1000, stop: tuple[str, ...] = ()) -> Choice:
    limits = ChoiceLimits(max_tokens, frozenset({EOS_TOKEN_ID}), stop, False, True)
    return Choice(0, limits, tokenizer, lambda choice: None)


def finished(choice: Choice) -> tuple[list[int], str, int]:
    choice.end(sampling_pb2.FINISH_REASON_LENGTH)
    choice.complete()
    message = choice.take()
    assert message is not None
    assert choice.take() is None or choice.is_complete
    return list(message.token_ids), message.text_delta, message.finish_reason


TEXTS = st.text(st.sampled_from("abcé€😀 "), max_size=30)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 5), max_size=60), stop=st.sampled_from([(), ("ab",), ("c", "€a")]))
def test_the_output_does_not_depend_on_the_cuts(
    tokenizer: Tokenizer, text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    ids = byte_ids(text)
    whole, cut = make_choice(tokenizer, stop=stop), make_choice(tokenizer, stop=stop)
    whole.accept(ids, ())
    for size in cuts:
        cut.accept(ids[:size], ())
        ids = ids[size:]
    cut.accept(ids, ())
    expected = finished(whole)
    assert finished(cut) == expected
    ends = [text.index(s) for s in stop if s in text]
    if not ends:
        assert expected[1] == text
    else:
        assert expected[2] == sampling_pb2.FINISH_REASON_STOP
        assert text.startswith(expected[1])


def test_tokens_after_the_end_are_dropped(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    choice.accept([*byte_ids("ab"), EOS_TOKEN_ID, *byte_ids("cd")], ())
    choice.accept(byte_ids("ef"), ())
    assert finished(choice) == ([*byte_ids("ab"), EOS_TOKEN_ID], "ab", sampling_pb2.FINISH_REASON_STOP)


def test_no_more_than_max_tokens_are_accepted(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer, max_tokens=3)
    choice.accept(byte_ids("abcdef"), ())
    assert choice.has_ended
    assert finished(choice) == (byte_ids("abc"), "abc", sampling_pb2.FINISH_REASON_LENGTH)


@pytest.mark.parametrize("build", [byte_level, sentencepiece, metaspace], ids=lambda build: build.__name__)
@pytest.mark.parametrize("text", ["hello world", "naïve 世", "hello</s>"])
def test_a_stop_token_that_is_kept_is_text_like_any_other(
    tmp_path: Path, build: Callable[[], tokenizers.Tokenizer], text: str
) -> None:
    tokenizer = Tokenizer.from_directory(save(tmp_path, build()))
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: ids.index(ids[-1]) + 1]
    choice = Choice(0, ChoiceLimits(1000, frozenset(ids[-1:]), (), True, False), tokenizer, lambda choice: None)
    for token_id in ids:
        choice.accept((token_id,), ())
    assert choice.has_ended
    assert finished(choice) == (
        ids,
        tokenizer.decode(ids, skip_special_tokens=False),
        sampling_pb2.FINISH_REASON_STOP,
    )


def test_a_stop_string_that_ends_with_a_kept_stop_token_is_kept_once(tokenizer: Tokenizer) -> None:
    (last,) = byte_ids("c")
    choice = Choice(0, ChoiceLimits(1000, frozenset({last}), ("bc",), True, True), tokenizer, lambda choice: None)
    choice.accept(byte_ids("abcd"), ())
    assert finished(choice)[:2] == (byte_ids("abc"), "abc")


async def test_a_slow_writer_gets_one_message_for_all_that_waited(tokenizer: Tokenizer) -> None:
    output = OutputStream("id", 1, 5, lambda: 0)
    limits = ChoiceLimits(1000, frozenset(), (), False, True)
    choice = Choice(0, limits, tokenizer, output.on_change)
    output.choices = [choice]
    written: list[inference_pb2.GenerateResponse] = []
    may_write, writing = asyncio.Event(), asyncio.Event()

    async def write(response: inference_pb2.GenerateResponse) -> None:
        written.append(response)
        writing.set()
        await may_write.wait()

    task = asyncio.create_task(output.write_to(write, 0))
    choice.accept(byte_ids("a"), ())
    await writing.wait()
    for _ in range(500):
        choice.accept(byte_ids("b"), ())
    may_write.set()
    choice.end(sampling_pb2.FINISH_REASON_LENGTH)
    choice.complete()
    await task
    assert [len(response.token_ids) for response in written] == [1, 500]
    assert written[1].text_delta == "b" * 500
    assert written[1].usage.num_output_tokens == 501


def position_logprobs(token_id: int, num_top: int) -> sampling_pb2.PositionLogprobs:
    top = [sampling_pb2.TokenLogprob(token_id=2**32 - 1, logprob=-2.5)] * num_top
    return sampling_pb2.PositionLogprobs(chosen=sampling_pb2.TokenLogprob(token_id=token_id, logprob=-1.5), top=top)


@pytest.mark.parametrize(("num_top", "num_tokens"), [(20, 2_000), (None, 50_000)])
async def test_what_waits_for_a_slow_client_comes_in_small_messages(
    tokenizer: Tokenizer, num_top: int | None, num_tokens: int
) -> None:
    output = OutputStream("id", 1, 5, lambda: 0)
    limits = ChoiceLimits(num_tokens, frozenset(), (), False, True)
    output.choices = [Choice(index, limits, tokenizer, output.on_change) for index in range(2)]
    text = "abcdefg€" * (num_tokens // 10)  # of ten bytes, which are tokens
    ids = byte_ids(text)
    for choice in output.choices:
        for start in range(0, num_tokens, 300):
            piece = ids[start : start + 300]
            choice.accept(piece, [] if num_top is None else [position_logprobs(i, num_top) for i in piece])
        choice.end(sampling_pb2.FINISH_REASON_LENGTH)
        choice.complete()
    written: list[inference_pb2.GenerateResponse] = []

    async def write(response: inference_pb2.GenerateResponse) -> None:
        written.append(response)

    await output.write_to(write, 0)
    assert max(response.ByteSize() for response in written) < 1 << 17  # what the lowest limit of a router lets it send
    for index in range(2):
        mine = [response for response in written if response.choice == index]
        assert [token_id for response in mine for token_id in response.token_ids] == ids
        assert "".join(response.text_delta for response in mine) == text
        told = [entry.chosen.token_id for response in mine for entry in response.logprobs]
        assert told == ([] if num_top is None else ids)
        assert all(len(response.logprobs) in (0, len(response.token_ids)) for response in mine)
        ends = [(bool(response.finish_reason), response.HasField("lifetime")) for response in mine]
        assert ends == [(False, False)] * (len(mine) - 1) + [(True, True)]
    assert [response.HasField("usage") for response in written] == [False] * (len(written) - 1) + [True]


@pytest.mark.parametrize("build", [byte_level, sentencepiece], ids=lambda build: build.__name__)
def test_logprobs_say_what_each_token_reads_as(tmp_path: Path, build: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer.from_directory(save(tmp_path, build()))
    text = "hello wörld 世界"
    ids = tokenizer.encode(text, add_special_tokens=False)
    special = tokenizer.token_id("<|end|>")
    assert special is not None
    choice = make_choice(tokenizer)
    for token_id in (*ids, special):
        entry = position_logprobs(token_id, 1)
        entry.top[0].token_id = special
        choice.accept((token_id,), (entry,))
    message = choice.take()
    assert message is not None
    *chosen, last = [entry.chosen for entry in message.logprobs]
    assert [token.token_id for token in chosen] == ids
    assert b"".join(token.utf8 for token in chosen).decode().strip() == text
    assert all(token.text == token.utf8.decode(errors="replace") for token in chosen)
    assert "\ufffd" in {token.text for token in chosen}  # a part of a character has no text of its own
    assert (last.text, last.utf8) == ("<|end|>", b"<|end|>")
    assert {(entry.top[0].text, entry.top[0].logprob) for entry in message.logprobs} == {("<|end|>", -2.5)}


def test_logprobs_that_wait_keep_no_message_of_a_worker(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    received = decode_pb2.SequenceTokens(token_ids=byte_ids("a"), logprobs=[position_logprobs(7, 1)])
    choice.accept(received.token_ids, received.logprobs)
    received.logprobs[0].chosen.token_id = 8  # seen by whoever holds a part of it
    message = choice.take()
    assert message is not None
    assert message.logprobs[0].chosen.token_id == 7


def entry(position: int, text: str, end: decode_pb2.SequenceEnd.ValueType = 0) -> decode_pb2.SequenceTokens:  # type: ignore[assignment]
    return decode_pb2.SequenceTokens(first_position=position, token_ids=byte_ids(text), end=end)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), overlap=st.integers(0, 3), first_after=st.integers(0, 6)
)
def test_each_token_is_taken_once_whenever_the_first_one_comes(
    tokenizer: Tokenizer, sizes: list[int], overlap: int, first_after: int
) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"[: 1 + sum(sizes)]

    async def receive(policy: FirstToken) -> None:
        choice = make_choice(tokenizer)
        receiver = SequenceReceiver(choice, policy)
        receiver.on_tokens(decode_pb2.SequenceTokens(steps_begin=True))
        position = 1
        for index, size in enumerate([*sizes, 0]):
            if index == min(first_after, len(sizes)):
                receiver.on_first_token(prefill_pb2.FirstToken(token_id=byte_ids("a")[0]))
            if size:
                start = max(1, position - overlap)
                receiver.on_tokens(entry(start, text[start : position + size]))
                position += size
        assert not receiver.ended.done()
        receiver.on_tokens(entry(0, "", decode_pb2.SEQUENCE_END_FINISHED))
        assert receiver.ended.done()
        assert finished(choice)[:2] == (byte_ids(text), text)

    for policy in FirstToken:
        asyncio.run(receive(policy))


async def test_a_finish_that_overtakes_the_first_token_waits_for_it(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    receiver = SequenceReceiver(choice)
    receiver.on_tokens(entry(1, "bc", decode_pb2.SEQUENCE_END_FINISHED))
    assert not receiver.ended.done()
    receiver.on_first_token(prefill_pb2.FirstToken(token_id=byte_ids("a")[0]))
    assert receiver.ended.result().end == decode_pb2.SEQUENCE_END_FINISHED
    assert finished(choice)[1] == "abc"


async def test_an_output_that_is_complete_is_finished_even_if_its_worker_is_lost(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer, max_tokens=3)
    receiver = SequenceReceiver(choice)
    receiver.on_first_token(prefill_pb2.FirstToken(token_id=byte_ids("a")[0]))
    receiver.on_tokens(entry(1, "bc", decode_pb2.SEQUENCE_END_LOST))
    assert receiver.ended.result().end == decode_pb2.SEQUENCE_END_FINISHED


FIRST = prefill_pb2.FirstToken(token_id=byte_ids("a")[0])


async def test_a_steady_first_token_is_held_until_the_first_step_begins(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    receiver = SequenceReceiver(choice, FirstToken.STEADY)
    receiver.on_first_token(FIRST)
    assert receiver.has_first_token
    assert not choice.tokens
    receiver.on_tokens(decode_pb2.SequenceTokens(steps_begin=True))
    assert choice.tokens == byte_ids("a")
    receiver.on_tokens(entry(1, "b"))
    assert choice.tokens == byte_ids("ab")


async def test_a_steady_first_token_that_comes_late_is_not_held(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    receiver = SequenceReceiver(choice, FirstToken.STEADY)
    receiver.on_tokens(decode_pb2.SequenceTokens(steps_begin=True, first_position=1, token_ids=byte_ids("b")))
    assert not choice.tokens
    receiver.on_first_token(FIRST)
    assert choice.tokens == byte_ids("ab")


async def test_a_steady_first_token_that_ends_the_output_is_not_held(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    receiver = SequenceReceiver(choice, FirstToken.STEADY)
    last = prefill_pb2.FirstToken(token_id=byte_ids("a")[0], finish_reason=sampling_pb2.FINISH_REASON_LENGTH)
    receiver.on_first_token(last)
    assert choice.tokens == byte_ids("a")
    assert receiver.ended.done()


async def test_a_held_first_token_is_not_in_the_log_when_its_worker_is_lost(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    receiver = SequenceReceiver(choice, FirstToken.STEADY)
    receiver.on_first_token(FIRST)
    receiver.on_lost()
    assert receiver.ended.result().end == decode_pb2.SEQUENCE_END_LOST
    assert not choice.tokens


async def test_all_tokens_of_a_local_sequence_come_from_decode(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    told: list[int] = []
    receiver = SequenceReceiver(choice, on_local_prefill=lambda prefill: told.append(prefill.prefill_ns))
    first = entry(0, "a")
    first.local_prefill.prefill_ns = 7
    receiver.on_tokens(first)
    assert (choice.tokens, told) == (byte_ids("a"), [7])
    receiver.on_tokens(entry(1, "bc", decode_pb2.SEQUENCE_END_FINISHED))
    assert receiver.ended.result().by_worker
    assert finished(choice)[1] == "abc"
