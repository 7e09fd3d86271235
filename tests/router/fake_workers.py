"""Prefill and decode workers without a model: real gRPC servers with scripted behaviour and known tokens.

The token at each position of an output depends on (choice, position) only, as with replayable sampling, so a
sequence that moves goes on exactly where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from baton.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    sampling_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

from common.errors import BatonError, Unavailable
from common.rpc.server import RpcServer
from common.rpc.status import to_status
from tests.router.byte_checkpoint import byte_ids
from tests.rpc.garbage import GARBAGE, with_garbage

MAX_MESSAGE_BYTES = 16 << 20
FINGERPRINT = "layout-1"
LOCAL_PREFILL = decode_pb2.LocalPrefill(queue_ns=11, prefill_ns=12, num_cached_tokens=13)
ALPHABET = byte_ids("abcdefghijklmnopqrstuvwxyz")


def letter_at(choice: int, position: int) -> int:
    """The default script: the alphabet, shifted by the choice."""
    return ALPHABET[(position + 3 * choice) % len(ALPHABET)]


def letters(choice: int, num_tokens: int) -> list[int]:
    return [letter_at(choice, position) for position in range(num_tokens)]


@dataclass
class Script:
    """What the fakes of one cluster do. Events are set when the fakes may go on."""

    token_at: Callable[[int, int], int] = letter_at
    tokens_per_batch: int = 1
    before_first_token: asyncio.Event = field(default_factory=lambda: _set_event())
    before_completed: asyncio.Event = field(default_factory=lambda: _set_event())
    before_decode: asyncio.Event = field(default_factory=lambda: _set_event())
    after_begin: asyncio.Event = field(default_factory=lambda: _set_event())  # steps began, no token yet
    # What happens when a sequence reaches a position, once each: an end, or a coroutine function on the worker.
    at_position: dict[int, decode_pb2.SequenceEnd.ValueType | Callable[[FakeDecode], Any]] = field(default_factory=dict)
    prefill_errors_before_token: list[BatonError] = field(default_factory=list)
    prefill_errors_after_token: list[BatonError] = field(default_factory=list)
    open_errors: list[BatonError] = field(default_factory=list)
    handoff_errors: dict[str, BatonError] = field(default_factory=dict)  # of every hand-off to a decode worker
    num_opens_ignored: int = 0  # how many more are not answered
    num_garbled_prefills: int = 0  # how many more answer with what is no message
    failed_end: str = "it failed"


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Identity and status; `set_state` is seen by every watcher."""

    def __init__(self, role: worker_pb2.WorkerRole.ValueType, name: str, script: Script) -> None:
        self.script = script
        self.status = worker_pb2.WorkerStatus(
            worker_id=name,
            incarnation="1",
            role=role,
            state=worker_pb2.WORKER_STATE_READY,
            layout_fingerprint=FINGERPRINT,
            model="m",
            block_size=64,
        )
        self.num_garbled_statuses = 0  # how many more are no message
        self.num_watches = 0
        self.is_mute = False  # watchers who come are told nothing
        self.watched_anew = asyncio.Event()
        self._changed = asyncio.Event()
        self.server: RpcServer | None = None
        self.address = "127.0.0.1:0"

    def set_state(self, state: worker_pb2.WorkerState.ValueType) -> None:
        self.status.state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        self.num_watches += 1
        if self.num_watches > 1:
            self.watched_anew.set()
        if self.is_mute:
            await asyncio.Event().wait()
        while True:
            changed = self._changed
            if self.num_garbled_statuses:
                self.num_garbled_statuses -= 1
                yield cast(worker_pb2.WorkerStatus, GARBAGE)
            yield self.status
            await changed.wait()

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.WorkerStatus:  # noqa: N802
        return self.status

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:  # noqa: N802
        self.set_state(worker_pb2.WORKER_STATE_DRAINING)
        return worker_pb2.DrainResponse()

    def _add_service(self, server: RpcServer) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Listen; on the same port as before, if there was one."""
        self.server = RpcServer(self.address, max_message_bytes=MAX_MESSAGE_BYTES)
        self.server.add(with_garbage(worker_pb2_grpc.add_WorkerServicer_to_server), self, "baton.v1.Worker")
        self._add_service(self.server)
        port = await self.server.start()
        self.address = f"127.0.0.1:{port}"
        self.server.set_serving(True)

    async def die(self) -> None:
        """Stop at once, as a process that is killed."""
        if self.server is not None:
            server, self.server = self.server, None
            await server.stop(0)


@dataclass
class OpenSequence:
    """A sequence on a fake decode worker."""

    session_id: str
    sequence: kv_pb2.Sequence
    is_local: bool = False
    task: asyncio.Task[None] | None = None


class Tickets:
    """Which sequence of which decode worker a ticket names; a hand-off may ask before the sequence is opened."""

    def __init__(self) -> None:
        self._sequences: dict[int, asyncio.Future[tuple[FakeDecode, int]]] = {}

    def opened(self, ticket_id: int, sequence: tuple[FakeDecode, int]) -> None:
        self._sequence(ticket_id).set_result(sequence)

    async def take(self, ticket_id: int) -> tuple[FakeDecode, int]:
        async with asyncio.timeout(20):
            return await self._sequence(ticket_id)

    def _sequence(self, ticket_id: int) -> asyncio.Future[tuple[FakeDecode, int]]:
        if ticket_id not in self._sequences:
            self._sequences[ticket_id] = asyncio.get_running_loop().create_future()
        return self._sequences[ticket_id]


class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServicer):
    """Produces the script's tokens for every sequence that joins."""

    hears_beats = True  # False: it is of a time before there were beats

    def __init__(self, name: str, script: Script, tickets: Tickets) -> None:
        super().__init__(worker_pb2.WORKER_ROLE_DECODE, name, script)
        self._tickets = tickets
        self._streams: dict[str, asyncio.Queue[decode_pb2.SessionResponse | None]] = {}
        self.sessions_begun: list[str] = []
        self.open: dict[int, OpenSequence] = {}
        self.opened: list[kv_pb2.Sequence] = []
        self.closed: list[int] = []
        self.is_wedged = False  # nothing is answered, on any stream
        self.num_beats = 0
        self.beat_seen = asyncio.Event()
        self.open_seen = asyncio.Event()
        self.close_seen = asyncio.Event()
        self._idle = asyncio.Event()

    def _add_service(self, server: RpcServer) -> None:
        server.add(with_garbage(decode_pb2_grpc.add_DecodeServicer_to_server), self, "baton.v1.Decode")

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[decode_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        begin = (await anext(request_iterator)).begin
        session_id = begin.session_id
        self.sessions_begun.append(session_id)
        queue = self._streams[session_id] = asyncio.Queue()
        reading = asyncio.create_task(self._read(session_id, request_iterator))
        try:
            beat = 0 if begin.beats and self.hears_beats else None
            yield decode_pb2.SessionResponse(tickets=kv_pb2.Ticket(rank_addresses=["fake://0"]), beat=beat)
            while (response := await queue.get()) is not None:
                yield response
            raise Unavailable("the stream breaks")
        finally:
            reading.cancel()
            if self._streams.get(session_id) is queue:
                del self._streams[session_id]
            for sequence_id, held in list(self.open.items()):
                if held.session_id == session_id:
                    self._release(sequence_id)

    async def _read(self, session_id: str, requests: AsyncIterator[decode_pb2.SessionRequest]) -> None:
        async for request in requests:
            if request.HasField("beat"):
                self.num_beats += 1
                self.beat_seen.set()
                if not self.is_wedged:
                    self._streams[session_id].put_nowait(decode_pb2.SessionResponse(beat=request.beat.number))
            elif self.is_wedged:
                continue
            elif request.HasField("open"):
                if self.script.num_opens_ignored:
                    self.script.num_opens_ignored -= 1
                    self._note(request.open)
                    sequence = request.open.sequence
                    self.open[sequence.sequence_id] = OpenSequence(session_id, sequence)
                    continue
                sequence_id = request.open.sequence.sequence_id
                answer = decode_pb2.OpenResponse(sequence_id=sequence_id)
                try:
                    self._open(session_id, request.open)
                except BatonError as error:
                    answer.error.CopyFrom(to_status(error))
                self._streams[session_id].put_nowait(decode_pb2.SessionResponse(opened=[answer]))
            else:
                self.closed.append(request.close.sequence_id)
                self._release(request.close.sequence_id)
                self.close_seen.set()

    def _note(self, request: decode_pb2.OpenRequest) -> None:
        self.opened.append(request.sequence)
        self.open_seen.set()

    def _open(self, session_id: str, request: decode_pb2.OpenRequest) -> None:
        self._note(request)
        if self.script.open_errors:
            raise self.script.open_errors.pop(0)
        sequence_id = request.sequence.sequence_id
        held = self.open[sequence_id] = OpenSequence(session_id, request.sequence, request.compute_locally)
        if held.is_local:
            self.join(sequence_id)
        else:
            self._tickets.opened(request.ticket_id, (self, sequence_id))

    def Handoff(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def join(self, sequence_id: int) -> None:
        """What a hand-off ends with."""
        held = self.open[sequence_id]
        held.task = asyncio.get_running_loop().create_task(self._decode(held))

    def garble_streams(self) -> None:
        """Every session says what is no message; it goes on."""
        for queue in self._streams.values():
            queue.put_nowait(cast(decode_pb2.SessionResponse, GARBAGE))

    def break_streams(self) -> None:
        """Every session breaks; the server stays."""
        for queue in self._streams.values():
            queue.put_nowait(None)

    async def wait_idle(self) -> None:
        """Until a sequence has left and none is open."""
        await asyncio.wait_for(self._idle.wait(), 20)

    def _release(self, sequence_id: int) -> bool:
        held = self.open.pop(sequence_id, None)
        if not self.open:
            self._idle.set()
        if held is not None and held.task is not None and held.task is not asyncio.current_task():
            held.task.cancel()
        return held is not None

    async def _decode(self, held: OpenSequence) -> None:
        sequence, script = held.sequence, self.script
        await script.before_decode.wait()
        position = len(sequence.token_ids) - sequence.num_prompt_tokens
        if not held.is_local:
            position += 1
            self._emit(held, decode_pb2.SequenceTokens(steps_begin=True))
            await script.after_begin.wait()
        while True:
            event = next((script.at_position.pop(p) for p in sorted(script.at_position) if p <= position), None)
            if callable(event):
                await event(self)
                if sequence.sequence_id not in self.open:
                    return
            elif event is not None:
                self._emit(held, decode_pb2.SequenceTokens(end=event, error=script.failed_end))
                return
            entry = self._next_tokens(sequence, position)
            if held.is_local and position == len(sequence.token_ids) - sequence.num_prompt_tokens:
                entry.local_prefill.CopyFrom(LOCAL_PREFILL)
            position += len(entry.token_ids)
            self._emit(held, entry)
            if entry.end:
                return
            await asyncio.sleep(0)

    def _next_tokens(self, sequence: kv_pb2.Sequence, position: int) -> decode_pb2.SequenceTokens:
        sampling = sequence.sampling
        entry = decode_pb2.SequenceTokens(first_position=position)
        ending = {*sequence.eos_token_ids, *sampling.stop_token_ids}
        for index in range(position, min(position + self.script.tokens_per_batch, sampling.max_tokens)):
            token_id = self.script.token_at(sequence.choice, index)
            entry.token_ids.append(token_id)
            if sampling.HasField("logprobs"):
                entry.logprobs.append(logprobs_of(token_id))
            if token_id in ending:
                entry.end, entry.finish_reason = decode_pb2.SEQUENCE_END_FINISHED, sampling_pb2.FINISH_REASON_STOP
                break
        if not entry.end and position + len(entry.token_ids) >= sampling.max_tokens:
            entry.end, entry.finish_reason = decode_pb2.SEQUENCE_END_FINISHED, sampling_pb2.FINISH_REASON_LENGTH
        if entry.end:
            entry.decode_queue_ns, entry.decode_ns = 5, 7
        return entry

    def _emit(self, held: OpenSequence, entry: decode_pb2.SequenceTokens) -> None:
        entry.sequence_id = held.sequence.sequence_id
        if entry.end:
            self._release(entry.sequence_id)
        queue = self._streams.get(held.session_id)
        if queue is not None:
            queue.put_nowait(decode_pb2.SessionResponse(sequences=[entry]))


class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServicer):
    """Answers with the script's next token, then lets decode join."""

    def __init__(self, name: str, script: Script, tickets: Tickets) -> None:
        super().__init__(worker_pb2.WORKER_ROLE_PREFILL, name, script)
        self._tickets = tickets
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.times_remaining: list[float] = []  # by gRPC's clock
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    def _add_service(self, server: RpcServer) -> None:
        server.add(with_garbage(prefill_pb2_grpc.add_PrefillServicer_to_server), self, "baton.v1.Prefill")

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        self.requests.append(request)
        self.times_remaining.append(context.time_remaining())
        self.entered.set()
        try:
            async with contextlib.aclosing(self._steps(request)) as steps:
                async for response in steps:
                    yield response
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _steps(self, request: prefill_pb2.PrefillRequest) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        script, sequence = self.script, request.sequence
        await script.before_first_token.wait()
        if script.num_garbled_prefills:
            script.num_garbled_prefills -= 1
            yield cast(prefill_pb2.PrefillResponse, GARBAGE)
        if script.prefill_errors_before_token:
            raise script.prefill_errors_before_token.pop(0)
        first = self._first_token(sequence)
        yield prefill_pb2.PrefillResponse(first_token=first)
        if script.prefill_errors_after_token:
            raise script.prefill_errors_after_token.pop(0)
        if not first.finish_reason:
            decode, sequence_id = await self._tickets.take(request.ticket.ticket_id)
            if decode.address in script.handoff_errors:
                raise script.handoff_errors[decode.address]
            if sequence_id in decode.open:
                decode.join(sequence_id)
        await script.before_completed.wait()
        completed = prefill_pb2.PrefillCompleted(
            queue_ns=1, prefill_ns=2, num_blocks_shipped=3, num_cached_tokens=4, transport="inproc:queue"
        )
        yield prefill_pb2.PrefillResponse(completed=completed)

    def _first_token(self, sequence: kv_pb2.Sequence) -> prefill_pb2.FirstToken:
        position = len(sequence.token_ids) - sequence.num_prompt_tokens
        token_id = self.script.token_at(sequence.choice, position)
        first = prefill_pb2.FirstToken(token_id=token_id)
        if sequence.sampling.HasField("logprobs"):
            first.logprobs.CopyFrom(logprobs_of(token_id))
        if token_id in {*sequence.eos_token_ids, *sequence.sampling.stop_token_ids}:
            first.finish_reason = sampling_pb2.FINISH_REASON_STOP
        elif position + 1 >= sequence.sampling.max_tokens:
            first.finish_reason = sampling_pb2.FINISH_REASON_LENGTH
        return first


def logprobs_of(token_id: int) -> sampling_pb2.PositionLogprobs:
    """Recognisable log-probabilities."""
    chosen = sampling_pb2.TokenLogprob(token_id=token_id, logprob=-token_id / 8)
    return sampling_pb2.PositionLogprobs(chosen=chosen, top=[chosen])
