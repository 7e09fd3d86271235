"""Which sequences decode, in which rows and blocks, and what is computed next. Pure: no I/O, no clock, no tensors.

             open            reserve: all blocks or none      join             a row is free
    (router) ────▶ OPEN ───────────────▶ RECEIVING ─────────▶ READY ─────────────▶ RUNNING
                    │ holds cached blocks   │ holds all blocks  │                     │
                    │      └── all blocks, and its prompt is computed here ─▶┘        │
                    ▼                       ▼                   ▼                     ▼
                   GONE: finished │ preempted │ lost │ deadline │ failed │ closed, from any state

What a step computes, and what becomes of its tokens, is in `steps`. A plan or a transfer *holds* the sequences that it
touches; the blocks of one that is gone are released with its last hold.

When a running sequence needs a block and none is available, the youngest gives way and is recomputed through a
prefill worker; the oldest never does, so it finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from common.errors import FailedPrecondition, InternalError
from common.kvcache.kv_cache_manager import KVCacheManager, KVCacheStats
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import AddRow, RemoveRow, StepResult
from services.decode.block_ledger import BlockLedger
from services.decode.open_sequences import OpenSequences
from services.decode.plans import Plan
from services.decode.request import (
    BlocksReserved,
    DecodeSequence,
    End,
    Event,
    Key,
    SequenceState,
)
from services.decode.row_table import RowTable
from services.decode.steps import Steps
from services.decode.turnover import RowTurnover
from services.decode.victims import idlest, youngest

_State = SequenceState


class DecodeScheduler:
    """Owner of rows, blocks and sequences. `max_open` bounds the sequences in all states together; `chunk_tokens`
    [at least 1] the prompt tokens of one step."""

    def __init__(
        self,
        make_kv: Callable[[], KVCacheManager],
        max_rows: int,
        max_open: int,
        model_digest: bytes,
        chunk_tokens: int = 256,
    ) -> None:
        assert chunk_tokens >= 1
        self._blocks = BlockLedger(make_kv, model_digest)
        self._open = OpenSequences(max_open)
        self._waiting: dict[int, DecodeSequence] = {}  # for blocks, by serial, first come first served
        self._ready: dict[int, DecodeSequence] = {}  # for a row, by serial, in order of join
        self._rows = RowTable(max_rows)
        self._max_rows = max_rows
        self._turnover = RowTurnover()
        self._events: list[Event] = []
        self._steps = Steps(self._blocks, self._rows, chunk_tokens, self._make_room, self._end, self._events)
        self._next_serial = 0

    @property
    def num_open(self) -> int:
        """Sequences in all states."""
        return len(self._open)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks, or for a row."""
        return len(self._waiting) + len(self._ready)

    @property
    def num_waiting_for_blocks(self) -> int:
        return len(self._waiting)

    @property
    def num_at_once(self) -> int:
        """Sequences that can decode at once: the rows, or as many as have found blocks while others wait for some."""
        if not self._waiting:
            return self._max_rows
        return min(self._max_rows, max(1, self._open.num_active))

    @property
    def row_s(self) -> float:
        """See `RowTurnover.row_s`."""
        return self._turnover.row_s(self.num_at_once)

    @property
    def step_s(self) -> float:
        """Time between two tokens of a sequence lately; 0 while none runs."""
        return self._turnover.step_s if self.num_running else 0.0

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of local prompts that no plan has yet. May be read from another thread."""
        return sum(seq.num_unplanned_tokens for seq in list(self._open.all) if seq.is_local)

    @property
    def num_plans_in_flight(self) -> int:
        return self._steps.num_in_flight

    @property
    def next_deadline_s(self) -> float | None:
        """The earliest deadline of all sequences."""
        seq = self._open.first_to_expire()
        return None if seq is None else seq.request.deadline_s

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def kv_stats(self) -> KVCacheStats:
        return self._blocks.stats()

    def find_ticket(self, ticket_id: int) -> DecodeSequence | None:
        """The sequence of a ticket, unless it is gone or computed here."""
        seq = self._open.find_ticket(ticket_id)
        return None if seq is None or seq.is_local else seq

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events[:] = self._events[:], []
        return events

    # Sequences come and go

    def open(
        self, session_id: str, request: SequenceRequest, ticket_id: int, *, is_local: bool = False, now_s: float = 0.0
    ) -> DecodeSequence:
        """Register a sequence and hold what is cached of it (`blocks.num_cached_blocks`) until it is gone.

        A local one goes its way by itself; the others wait for their hand-off.
        """
        self._open.check_new((session_id, request.sequence_id), ticket_id)
        self._blocks.check_fits(request)
        blocks, hashes = self._blocks.admit(request)
        seq = DecodeSequence(
            session_id=session_id,
            request=request,
            ticket_id=ticket_id,
            serial=self._next_serial,
            blocks=blocks,
            hashes=hashes,
            num_handoff_blocks=-(-len(request.token_ids) // self._blocks.block_size),
            token_ids=request.token_ids[:],
            num_verified=blocks.num_cached_blocks,
            is_local=is_local,
            opened_s=now_s,
        )
        seq.num_chunked = seq.num_computed = blocks.num_cached_blocks * self._blocks.block_size
        self._next_serial += 1
        self._open.add(seq)
        if is_local:
            self.reserve(seq)
        return seq

    def close(self, key: Key, now_s: float = 0.0) -> bool:
        """Let go of a sequence on its owner's word, which may be that its time is up. False if it is not open."""
        seq = self._open.find(key)
        if seq is None:
            return False
        self._end(seq, seq.end_when_closed(now_s))
        self._grant_waiting()
        return True

    def close_session(self, session_id: str, end: End = End.CLOSED) -> None:
        """Let go of all sequences of a router process."""
        for seq in self._open.of_session(session_id):
            self._end(seq, end)
        self._grant_waiting()

    def fail(self, seq: DecodeSequence, error: str) -> None:
        """End one sequence because of an error of its own; no effect if it is gone."""
        if seq.state is not _State.GONE:
            self._end(seq, End.FAILED, error=error)
            self._grant_waiting()

    def expire(self, now_s: float) -> None:
        """End every sequence whose deadline has passed."""
        while (seq := self._open.first_to_expire()) is not None and seq.request.deadline_s <= now_s:
            self._end(seq, End.DEADLINE)
        self._grant_waiting()

    def lose_all(self) -> None:
        """The ranks are gone and with them every block's content: end all sequences, forget the cache."""
        for seq in list(self._open.all):
            self._end(seq, End.LOST)
        self._blocks.forget_all()
        self._steps.forget_all()
        self._rows.reset()

    # The hand-off

    def reserve(self, seq: DecodeSequence) -> bool:
        """Give an open sequence all blocks that its hand-off fills. False: it waits, and `BlocksReserved` follows."""
        if seq.state is _State.OPEN:
            self._waiting.setdefault(seq.serial, seq)
            self._grant_waiting()
        return seq.state is _State.RECEIVING

    def hold(self, seq: DecodeSequence) -> None:
        """A transfer may write to the sequence's blocks from now on."""
        self._blocks.hold(seq)

    def release_hold(self, seq: DecodeSequence) -> None:
        """A transfer can write no more."""
        self._blocks.drop_hold(seq)
        self._grant_waiting()

    def verify(self, seq: DecodeSequence, blocks: Iterable[int]) -> None:
        """Blocks of a hand-off are in place."""
        if seq.state is _State.RECEIVING:
            self._blocks.verify(seq, blocks)

    def finalize(self, seq: DecodeSequence, num_blocks: int) -> None:
        """So many leading blocks of a hand-off were computed right: they may be cached once they are in place."""
        if seq.state in (_State.OPEN, _State.RECEIVING):
            self._blocks.finalize(seq, num_blocks)

    def join(self, seq: DecodeSequence, first_token_id: int, now_s: float) -> None:
        """Everything is in place: the sequence decodes when a row is free."""
        if seq.state is not _State.RECEIVING or seq.num_verified < seq.num_handoff_blocks:
            raise FailedPrecondition(
                f"{seq.num_verified} of {seq.num_handoff_blocks} blocks are verified, the sequence is {seq.state.name}"
            )
        seq.token_ids.append(first_token_id)
        seq.num_chunked = seq.num_computed = seq.num_handoff_tokens
        seq.joined_s = now_s
        seq.state = _State.READY
        self._ready[seq.serial] = seq
        if reason := seq.request.finish_reason(first_token_id, seq.request.num_output_tokens):
            self._end(seq, End.FINISHED, finish_reason=reason)
            self._grant_waiting()

    # Steps

    def plan(self, now_s: float) -> Plan:
        """The next step, if there is anything to compute and fewer than two plans are in flight."""
        messages: list[AddRow | RemoveRow] = [*self._rows.recycle()]
        if self._steps.is_full:
            return Plan(messages, None)
        while self._ready and self._rows.has_free:
            messages.append(self._give_row(self._ready.pop(next(iter(self._ready))), now_s))
        step = self._steps.plan(now_s)
        self._grant_waiting()
        return Plan(messages, step)

    def complete(self, result: StepResult, now_s: float) -> int:
        """Take a plan's tokens, in order of plans. Returns how many were discarded."""
        num_discarded = self._steps.complete(result, now_s)
        self._turnover.stepped(now_s, is_busy=self._steps.num_in_flight > 0)
        self._grant_waiting()
        return num_discarded

    def check_integrity(self) -> None:
        """Verify blocks, rows and queues from scratch. Raises `InternalError`."""
        self._blocks.check_integrity()
        self._rows.check_integrity()
        self._open.check_integrity()
        waiting, ready = self._waiting.values(), self._ready.values()
        states = ((_State.OPEN, waiting), (_State.READY, ready), (_State.RUNNING, self._rows.sequences))
        for state, members in states:
            if any(seq.state is not state for seq in members):
                raise InternalError(f"a sequence is wrongly listed as {state.name}")

    def _give_row(self, seq: DecodeSequence, now_s: float) -> AddRow:
        self._rows.give(seq)
        seq.state = _State.RUNNING
        if not seq.is_local:
            seq.first_step_s = seq.last_token_s = now_s
        return seq.add_row()

    def _make_room(self, seq: DecodeSequence) -> bool:
        """Preempt one sequence in favour of `seq`. False if it had to be `seq` itself."""
        decoding = [*self._rows.sequences, *self._ready.values()]
        victim = youngest(decoding) if len(decoding) > 1 else idlest(seq, self._open.all)
        self._end(victim, End.PREEMPTED)
        return victim is not seq

    def _end(self, seq: DecodeSequence, end: End, finish_reason: int = 0, error: str = "") -> None:
        """The one way out of every state."""
        assert seq.state is not _State.GONE
        if seq.state in (_State.READY, _State.RUNNING) and end not in (End.FAILED, End.LOST):
            self._blocks.commit_all(seq)
        if seq.state is _State.RUNNING:
            self._rows.leave(seq)
            if seq.last_token_s and end not in (End.LOST, End.PREEMPTED):
                self._turnover.left(seq.last_token_s - (seq.scheduled_s if seq.is_local else seq.first_step_s))
        self._waiting.pop(seq.serial, None)
        self._ready.pop(seq.serial, None)
        self._open.remove(seq)
        seq.state = _State.GONE
        self._events.append(seq.ended(end, finish_reason, error))
        self._blocks.release(seq)

    def _grant_waiting(self) -> None:
        """Give blocks to those that wait for them, in order. Called whenever blocks may have come free."""
        while self._waiting:
            seq = next(iter(self._waiting.values()))
            if self._blocks.fill_handoff(seq, self._open.num_active):
                del self._waiting[seq.serial]
                if seq.is_local:
                    seq.state = _State.READY
                    self._ready[seq.serial] = seq
                else:
                    seq.state = _State.RECEIVING
                    self._events.append(BlocksReserved(seq.ticket_id))
            elif self._open.num_active or self._blocks.has_dying:
                return  # they finish, and then there are blocks
            else:
                # Only cached blocks that open sequences hold are in the way.
                self._end(idlest(seq, self._open.all), End.PREEMPTED)
