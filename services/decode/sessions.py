"""The sessions of the router processes: what is pending is merged per sequence, into messages of bounded size. A slow
router gets few messages for many steps, and is given up when too many of them wait, or when it is silent.

Knows neither blocks nor ranks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from baton.v1 import decode_pb2, kv_pb2, sampling_pb2

from common.awake_clock import TICK_S, AwakeClock
from common.errors import (
    BatonError,
    Cancelled,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    WorkerDraining,
)
from common.message_bounds import MAX_NAME_CHARS, check_chars
from services.decode.request import End, PromptComputed, RouterEvent, SequenceEnded, StepsBegin, TokenSampled

# Of tokens in one message: far below what any router takes, whatever its settings.
MAX_MESSAGE_TOKEN_BYTES = 32 << 10
MAX_FULL_MESSAGES = 2048  # that wait for a router that does not read; more, and its session ends
MAX_MESSAGE_ANSWERS = 64  # of Opens, in one message
MAX_ANSWERS = 1 << 15  # that wait, refusals included; more, and the session ends
SILENT_AFTER_S = 4.0  # without a word of a router that beats; its clock is `AwakeClock`
_TOKEN_BYTES = 5  # of a token id in a message, at most
_LOGPROB_BYTES = 15  # of each log-probability beside it, the messages that hold it included, at most

_PROTO_END = {
    End.FINISHED: decode_pb2.SEQUENCE_END_FINISHED,
    End.PREEMPTED: decode_pb2.SEQUENCE_END_PREEMPTED,
    End.LOST: decode_pb2.SEQUENCE_END_LOST,
    End.DEADLINE: decode_pb2.SEQUENCE_END_DEADLINE,
    End.FAILED: decode_pb2.SEQUENCE_END_FAILED,
}


class Session:
    """One router process while its stream stands. `beats`: it promised signs of life."""

    def __init__(
        self, session_id: str, max_pending: int, tickets: kv_pb2.Ticket | None, clock: AwakeClock, beats: bool
    ) -> None:
        self.session_id = session_id
        self._beats = beats
        self._beat: int | None = 0 if beats else None  # to be answered
        self._clock = clock
        self._heard_s = clock.now_s
        self._tickets = tickets  # to be told
        self._max_pending = max_pending
        self._full: deque[dict[int, decode_pb2.SequenceTokens]] = deque()  # messages to which nothing is added
        self._pending: dict[int, decode_pb2.SequenceTokens] = {}  # the last message
        self._num_token_bytes = 0  # in it, at most
        self._answers: deque[decode_pb2.OpenResponse] = deque()
        self._num_opened = 0  # answers that are no refusals, since all were read
        self._flushed = asyncio.Event()
        self._over = asyncio.Event()
        self._error: BatonError | None = None

    @property
    def is_over(self) -> bool:
        """Whether it was ended, by its router, by another stream, or by the worker."""
        return self._error is not None

    async def wait_over(self) -> BatonError:
        """Wait until it was ended; returns what ended it."""
        await self._over.wait()
        assert self._error is not None
        return self._error

    async def responses(self) -> AsyncGenerator[decode_pb2.SessionResponse, None]:
        """One that says that the session stands, then what is new. Raises what ended the session."""
        tickets, self._tickets = self._tickets, None
        beat, self._beat = self._beat, None
        yield decode_pb2.SessionResponse(tickets=tickets, beat=beat)
        while True:
            await self._flushed.wait()
            self._flushed.clear()
            self._begin_message()
            while self._full or self._answers:
                if self._error is not None:
                    raise self._error
                pending = self._full.popleft() if self._full else {}
                answers = [self._answers.popleft() for _ in range(min(len(self._answers), MAX_MESSAGE_ANSWERS))]
                if not self._answers:
                    self._num_opened = 0
                tickets, self._tickets = self._tickets, None
                beat = None
                if not self._answers:  # its answer would say that those before it were overlooked
                    beat, self._beat = self._beat, None
                yield decode_pb2.SessionResponse(sequences=pending.values(), opened=answers, tickets=tickets, beat=beat)

    def heard(self) -> None:
        """The router said something."""
        self._heard_s = self._clock.now_s

    def answer_beat(self, number: int) -> None:
        """Say that the router's sign of life was heard, and give one."""
        self._beat = number
        self._flushed.set()

    def end_if_silent(self) -> None:
        """Give a router up that promised signs of life and gives none."""
        if self._beats and self._clock.now_s - self._heard_s > SILENT_AFTER_S:
            self.end(Unavailable(f"nothing was heard of the router for {SILENT_AFTER_S:g} s"))

    def tell_tickets(self, tickets: kv_pb2.Ticket) -> None:
        """Say what tickets say from now on."""
        self._tickets = tickets
        self._flushed.set()

    def answer(self, response: decode_pb2.OpenResponse) -> None:
        """Say what became of an Open."""
        self._answers.append(response)
        self._flushed.set()
        # Refusals in a rush are no sign of a router that does not read, and they take nothing here.
        if len(self._answers) > MAX_ANSWERS:
            self._end_unless_read(len(self._answers))
        elif not response.HasField("error"):
            self._num_opened += 1
            self._end_unless_read(self._num_opened)

    def add_token(self, event: TokenSampled) -> None:
        """Append a token to what is pending of its sequence."""
        if self._num_token_bytes >= MAX_MESSAGE_TOKEN_BYTES:
            self._begin_message()
        self._num_token_bytes += _TOKEN_BYTES
        entry = self._entry(event.key[1])
        if not entry.token_ids:
            entry.first_position = event.position
        entry.token_ids.append(event.token_id)
        if event.logprob is not None:
            entry.logprobs.append(_logprobs(event.token_id, event.logprob, event.top_logprobs))
            self._num_token_bytes += _LOGPROB_BYTES * (1 + len(event.top_logprobs))

    def add_prompt(self, event: PromptComputed) -> None:
        """Say how the prompt was computed here, with the first token."""
        prefill = self._entry(event.key[1]).local_prefill
        prefill.queue_ns, prefill.prefill_ns = event.queue_ns, event.prefill_ns
        prefill.num_cached_tokens = event.num_cached_tokens

    def add_begin(self, event: StepsBegin) -> None:
        """Say that the first step is under way."""
        self._entry(event.key[1]).steps_begin = True

    def add_end(self, event: SequenceEnded) -> None:
        """Say how a sequence ended, after its last token."""
        entry = self._entry(event.key[1])
        entry.end = _PROTO_END[event.end]
        entry.finish_reason = sampling_pb2.FinishReason.ValueType(event.finish_reason)
        entry.error = event.error
        entry.decode_queue_ns = event.decode_queue_ns
        entry.decode_ns = event.decode_ns

    def flush(self) -> None:
        """Let the stream have what is pending; end it if that is more than a router may owe us."""
        if self._pending:
            self._flushed.set()
        self._end_unless_read(len(self._pending))
        if len(self._full) > MAX_FULL_MESSAGES:
            self.end(ResourceExhausted(f"{len(self._full)} full messages wait for a router that does not read"))

    def end(self, error: BatonError) -> None:
        """The stream raises this next, unless it was ended before."""
        self._error = self._error or error
        self._over.set()
        self._flushed.set()

    def _begin_message(self) -> None:
        """What comes from now on goes into another message than what is pending."""
        self._full.append(self._pending)
        self._pending = {}
        self._num_token_bytes = 0

    def _end_unless_read(self, num_pending: int) -> None:
        if num_pending > self._max_pending:
            self.end(ResourceExhausted(f"{num_pending} messages wait for a router that does not read"))

    def _entry(self, sequence_id: int) -> decode_pb2.SequenceTokens:
        entry = self._pending.get(sequence_id)
        if entry is None:
            entry = self._pending[sequence_id] = decode_pb2.SequenceTokens(sequence_id=sequence_id)
        return entry


class Sessions:
    """All router sessions. `max_pending` bounds the sequences in a message, per session."""

    def __init__(self, max_pending: int, max_sessions: int = 256) -> None:
        self._max_pending = max_pending
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}
        self._tickets: kv_pb2.Ticket | None = None
        self._clock = AwakeClock(time.monotonic())

    async def run(self) -> None:
        """End the sessions of routers that are silent, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.look(time.monotonic())

    def look(self, monotonic_s: float) -> None:
        """One tick: which routers are silent?"""
        self._clock.tick(monotonic_s)
        for session in self._sessions.values():
            session.end_if_silent()

    def begin(self, session_id: str, beats: bool = False) -> Session:
        """Open a session; one of the same name ends with `Cancelled`."""
        check_chars("begin.session_id", session_id, MAX_NAME_CHARS)
        previous = self._sessions.pop(session_id, None)
        if previous is not None:
            previous.end(Cancelled("another stream of this session replaced this one"))
        if len(self._sessions) >= self._max_sessions:
            raise ResourceExhausted(f"{self._max_sessions} routers are subscribed")
        session = self._sessions[session_id] = Session(session_id, self._max_pending, self._tickets, self._clock, beats)
        return session

    def tell_tickets(self, tickets: kv_pb2.Ticket) -> None:
        """Say to every router, now and later, what tickets of this worker say but for their ids."""
        self._tickets = tickets
        for session in self._sessions.values():
            session.tell_tickets(tickets)

    def finish(self, session: Session) -> bool:
        """The stream is over. False if another had replaced it."""
        if self._sessions.get(session.session_id) is not session:
            return False
        del self._sessions[session.session_id]
        return True

    def end_all(self) -> None:
        """The worker stops: end every stream."""
        for session in self._sessions.values():
            session.end(WorkerDraining("the worker is stopping"))

    def require(self, session_id: str) -> None:
        """Raises `FailedPrecondition` unless the session's stream stands."""
        if session_id not in self._sessions:
            raise FailedPrecondition("the session has no stream")

    def publish(self, event: RouterEvent) -> None:
        """Queue an event for its router, if that is still there. Call `flush` after a step's events."""
        session = self._sessions.get(event.key[0])
        if session is None:
            return
        if isinstance(event, TokenSampled):
            session.add_token(event)
        elif isinstance(event, StepsBegin):
            session.add_begin(event)
        elif isinstance(event, PromptComputed):
            session.add_prompt(event)
        elif event.end is not End.CLOSED:
            session.add_end(event)

    def flush(self) -> None:
        """Let every stream have what is pending: one batch per router and step."""
        for session in self._sessions.values():
            session.flush()


def _logprobs(token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> sampling_pb2.PositionLogprobs:
    return sampling_pb2.PositionLogprobs(
        chosen=sampling_pb2.TokenLogprob(token_id=token_id, logprob=logprob),
        top=[sampling_pb2.TokenLogprob(token_id=other, logprob=value) for other, value in top],
    )
