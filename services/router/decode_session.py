"""This router's session with one decode worker: sequences are opened and closed on it, and their tokens come back.

Entries go to receivers by sequence id in plain calls, without a task or an await per token. When the stream breaks,
every receiver is told that its sequence is lost; the worker closes them by itself. A stream that stands and brings
nothing is given up: beats ask for a sign of life all the way through it (`session_beats`). Knows nothing of what
receivers do with tokens.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import grpc
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_pb2

from common.awake_clock import AwakeClock
from common.errors import BatonError, InternalError, InvalidArgument, Unavailable
from common.rpc.client import decoded
from common.rpc.status import error_from_rpc, error_from_status
from services.router.cancellation import is_being_cancelled
from services.router.session_beats import SessionBeats

_logger = logging.getLogger(__name__)
_Call: TypeAlias = "grpc.aio.StreamStreamCall[decode_pb2.SessionRequest, decode_pb2.SessionResponse]"

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
OPEN_TIMEOUT_S = 5.0  # registering is book-keeping: a worker that takes longer hangs
MAX_OUTGOING = 8192  # messages that wait for a worker that does not read; more, and it counts as lost
_MAX_TOKEN_BYTES = 5  # of a token id in a message
_MAX_OTHER_BYTES = 4096  # of an Open besides token ids and sampling, all of which validation bounds


class TokenReceiver(Protocol):
    """Where the tokens of one sequence go."""

    def on_tokens(self, entry: decode_pb2.SequenceTokens) -> None:
        """New tokens, or the end. The entry is the receiver's to keep."""
        ...

    def on_lost(self) -> None:
        """The worker is gone, and the sequence with it. Nothing follows."""
        ...

    def on_failed(self, error: BatonError) -> None:
        """An entry could not be taken. Nothing follows."""
        ...


@dataclass(frozen=True, slots=True)
class _Opening:
    """An Open that is on its way."""

    answer: asyncio.Future[decode_pb2.OpenResponse]
    sent_s: float  # of the session's clock
    num_beats_before: int


class DecodeSession:
    """Keeps the stream up and routes what it brings."""

    def __init__(
        self,
        address: str,
        stub: decode_pb2_grpc.DecodeAsyncStub,
        session_id: str,
        max_message_bytes: int,
        clock: AwakeClock,
        on_change: Callable[[], None],
    ) -> None:
        self._address = address
        self._stub = stub
        self._session_id = session_id
        self._max_message_bytes = max_message_bytes
        self._on_change = on_change
        self._receivers: dict[int, TokenReceiver] = {}
        self._opening: dict[int, _Opening] = {}  # what was not answered, whether or not somebody waits for it still
        self._outgoing: deque[decode_pb2.SessionRequest] = deque()
        self._has_outgoing = asyncio.Event()
        self._call: _Call | None = None
        self._given_up = ""  # why the call was cancelled
        self._clock = clock
        self._beats = SessionBeats(clock.now_s)
        self._tickets: kv_pb2.Ticket | None = None  # without an id
        self.stands = False

    def add(self, sequence_id: int, receiver: TokenReceiver) -> None:
        """Route a sequence to its receiver. Raises `Unavailable` while the stream is down."""
        self._require_standing()
        self._receivers[sequence_id] = receiver

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; what still arrives for it is dropped."""
        self._receivers.pop(sequence_id, None)

    @property
    def takes_handoffs(self) -> bool:
        """Whether it stands and the worker has said what tickets say."""
        return self.stands and self._tickets is not None

    def new_ticket(self) -> kv_pb2.Ticket:
        """For a sequence that will be handed off. Raises `Unavailable` while the worker takes none."""
        if self._tickets is None:
            raise Unavailable(f"{self._address} takes no hand-offs")
        ticket = kv_pb2.Ticket(ticket_id=secrets.randbits(64))
        ticket.MergeFrom(self._tickets)
        return ticket

    async def open(self, request: decode_pb2.SessionRequest) -> decode_pb2.OpenResponse:
        """Register the sequence of an Open and wait for the answer. Raises what it was refused for, and `Unavailable`
        if the stream breaks. Cancelling it leaves the sequence open, or about to be: `close` it."""
        self._require_standing()
        sequence = request.open.sequence
        most = _MAX_TOKEN_BYTES * len(sequence.token_ids) + sequence.sampling.ByteSize() + _MAX_OTHER_BYTES
        # Measuring takes as long as encoding, and Prefill waits for it: done only where it may be too much.
        if most > self._max_message_bytes and (num_bytes := request.ByteSize()) > self._max_message_bytes:
            # It would break the stream for everybody.
            raise InvalidArgument("prompt", f"{num_bytes} bytes as a message", f"at most {self._max_message_bytes}")
        sequence_id = sequence.sequence_id
        answer: asyncio.Future[decode_pb2.OpenResponse] = asyncio.get_running_loop().create_future()
        self._opening[sequence_id] = _Opening(answer, self._clock.now_s, self._beats.num_sent)
        self._send(request)
        response = await answer
        if response.HasField("error"):
            raise error_from_status(response.error)
        return response

    def close(self, sequence_id: int) -> None:
        """Release a sequence. If the stream is down, or breaks, the worker does it unasked."""
        if self.stands:
            self._send(decode_pb2.SessionRequest(close=decode_pb2.CloseRequest(sequence_id=sequence_id)))

    def look(self) -> None:
        """Ask for a sign of life when it is time, and give the stream up if there was none; call it at every tick of
        the clock."""
        if self._call is None:
            return
        now_s = self._clock.now_s
        self._send_due_beat()
        oldest = next(iter(self._opening.values()), None)
        if oldest is not None and self._is_overdue(oldest):
            self.give_up(f"an Open was not answered within {OPEN_TIMEOUT_S:g} s")
        elif self._beats.is_silent(now_s):
            self.give_up("it is silent")

    def _is_overdue(self, opening: _Opening) -> bool:
        """An Open behind many others, which are answered one after the other, is not."""
        is_late = self._clock.now_s - opening.sent_s > OPEN_TIMEOUT_S
        return is_late and self._beats.is_passed_over(opening.num_beats_before)

    def give_up(self, reason: str) -> None:
        """Break the stream: its sequences are lost, and another one is begun."""
        if self._call is not None:
            self._given_up = self._given_up or reason
            self._call.cancel()

    async def run(self) -> None:
        """Keep a stream up, again and again, until cancelled. Whatever it ends with ends this stream alone."""
        retry_s = FIRST_RETRY_S
        while True:
            error: Exception = Unavailable("the worker ended the stream")
            try:
                await self._run_one_stream()
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
            except BatonError as ours:
                error = ours
            except Exception as unexpected:  # the other workers' streams must not end with it
                _logger.exception("session with %s failed", self._address)
                error = unexpected
            finally:
                was_standing = self.stands
                self._lose_all()
            retry_s = FIRST_RETRY_S if was_standing else min(2 * retry_s, LAST_RETRY_S)
            if was_standing:
                _logger.warning("session with %s broke: %s", self._address, error)
            await asyncio.sleep(retry_s)

    async def _run_one_stream(self) -> None:
        self._outgoing.clear()
        self._given_up = ""
        self._beats = SessionBeats(self._clock.now_s)
        self._send(decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id=self._session_id, beats=True)))
        call: _Call = self._stub.Session(wait_for_ready=True)
        writing = asyncio.create_task(self._write_to(call))
        self._call = call
        try:
            async for message in call:
                response = decoded(message, self._address)
                self._beats.take(response, self._clock.now_s)
                if not self.stands:
                    self._send_due_beat()  # the first one does not wait for a tick
                    self.stands = self._beats.are_answered
                    self._on_change()
                if response.HasField("tickets"):
                    self._tickets = response.tickets if response.tickets.rank_addresses else None
                    self._on_change()
                self._route(response)
        except asyncio.CancelledError:
            # Either the call was cancelled, by `give_up`, or this task.
            if not self._given_up or is_being_cancelled():
                raise
            raise Unavailable(self._given_up) from None
        finally:
            self._call = None
            call.cancel()
            writing.cancel()
            await asyncio.wait({writing})

    async def _write_to(self, call: _Call) -> None:
        """One message after the other. When the call breaks, whoever reads it says so."""
        try:
            while True:
                await self._has_outgoing.wait()
                self._has_outgoing.clear()
                while self._outgoing:
                    await call.write(self._outgoing.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            _logger.debug("writing to %s failed", self._address, exc_info=True)
        except Exception:  # nothing would be written any more, and nobody told
            _logger.exception("writing to %s failed", self._address)
            self.give_up("nothing can be written to it")

    def _send(self, request: decode_pb2.SessionRequest) -> None:
        self._outgoing.append(request)
        self._has_outgoing.set()
        if len(self._outgoing) > MAX_OUTGOING:
            self.give_up("it does not read")

    def _send_due_beat(self) -> None:
        number = self._beats.next_number(self._clock.now_s)
        if number:
            self._send(decode_pb2.SessionRequest(beat=decode_pb2.SessionBeat(number=number)))

    def _require_standing(self) -> None:
        if not self.stands:
            raise Unavailable(f"no session with {self._address}")

    def _route(self, response: decode_pb2.SessionResponse) -> None:
        for opened in response.opened:
            opening = self._opening.pop(opened.sequence_id, None)
            if opening is not None and not opening.answer.done():
                opening.answer.set_result(opened)
        receivers = self._receivers
        for entry in response.sequences:
            receiver = receivers.get(entry.sequence_id)
            if receiver is not None:
                try:
                    receiver.on_tokens(entry)
                except Exception as error:  # of this sequence alone
                    _logger.exception("tokens of sequence %d of %s cannot be taken", entry.sequence_id, self._address)
                    receiver.on_failed(InternalError(f"tokens of {self._address} cannot be taken: {error!r}"))

    def _lose_all(self) -> None:
        self.stands = False
        self._tickets = None
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.on_lost()
        opening, self._opening = self._opening, {}
        for unanswered in opening.values():
            if not unanswered.answer.done():
                unanswered.answer.set_exception(Unavailable(f"the session with {self._address} broke"))
        self._on_change()
