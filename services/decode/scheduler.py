"""Which sequences decode, in which rows and blocks, and what is computed next. Pure: no I/O, no clock, no tensors.

             open            reserve: all blocks or none      join             a row is free
    (router) ────▶ OPEN ───────────────▶ RECEIVING ─────────▶ READY ─────────────▶ RUNNING
                    │ holds cached blocks   │ holds all blocks  │                     │
                    ▼                       ▼                   ▼                     ▼
                   GONE: finished │ preempted │ lost │ deadline │ failed │ closed, from any state

Up to two plans are in flight: plan n+1 is made while n runs, and takes the token that n samples from the device. So
an end is seen one step late, and the token of that step is discarded. A plan or a transfer *holds* the sequences that
it touches; the blocks of one that is gone are released with its last hold.

When a running sequence needs a block and none is available, the youngest gives way and is recomputed through a
prefill worker; the oldest never does, so it finishes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import FailedPrecondition, InternalError, InvalidArgument, ResourceExhausted
from common.kvcache.block_hash import hash_block, hash_blocks, root_hash, tenant_salt
from common.kvcache.kv_cache_manager import KVCacheManager, KVCacheStats
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import AddRow, RemoveRow, SampledToken, Segment, StepPlan, StepResult
from services.decode.request import (
    BlocksReserved,
    DecodeSequence,
    End,
    Event,
    Key,
    SequenceEnded,
    SequenceState,
    TokenSampled,
)

MAX_PLANS_IN_FLIGHT = 2
_State = SequenceState


@dataclass(frozen=True, slots=True)
class Plan:
    """What to tell the ranks, in order: rows that change hands, then at most one step."""

    messages: list[AddRow | RemoveRow]
    step: StepPlan | None


@dataclass(frozen=True, slots=True)
class _PlannedRow:
    seq: DecodeSequence
    output_index: int


class DecodeScheduler:
    """Owner of rows, blocks and sequences. `max_open` bounds the sequences in all states together."""

    def __init__(
        self,
        make_kv: Callable[[], KVCacheManager],
        max_rows: int,
        max_open: int,
        model_digest: bytes,
    ) -> None:
        self._make_kv = make_kv
        self._kv = make_kv()
        self._max_rows = max_rows
        self._max_open = max_open
        self._model_digest = model_digest
        self._sequences: dict[Key, DecodeSequence] = {}
        self._by_ticket: dict[int, DecodeSequence] = {}
        self._waiting: dict[int, DecodeSequence] = {}  # for blocks, by serial, first come first served
        self._ready: dict[int, DecodeSequence] = {}  # for a row, by serial, in order of join
        self._rows: dict[int, DecodeSequence] = {}
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._leaving_rows: list[int] = []
        self._dying: set[DecodeSequence] = set()  # gone, but still held
        self._in_flight: deque[tuple[int, list[_PlannedRow]]] = deque()
        self._deadlines: list[tuple[float, int, DecodeSequence]] = []
        self._events: list[Event] = []
        self._next_serial = 0
        self._next_step_id = 0

    # What is asked

    @property
    def num_open(self) -> int:
        """Sequences in all states."""
        return len(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting_for_blocks(self) -> int:
        return len(self._waiting)

    @property
    def num_plans_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def next_deadline_s(self) -> float | None:
        """The earliest deadline of all sequences."""
        while self._deadlines and self._deadlines[0][2].state is _State.GONE:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def kv_stats(self) -> KVCacheStats:
        return self._kv.stats()

    def find_ticket(self, ticket_id: int) -> DecodeSequence | None:
        """The sequence of a ticket, unless it is gone."""
        return self._by_ticket.get(ticket_id)

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # Sequences come and go

    def open(self, session_id: str, request: SequenceRequest, ticket_id: int) -> DecodeSequence:
        """Register a sequence and hold what is cached of it (`blocks.num_cached_blocks`) until it is gone."""
        if (session_id, request.sequence_id) in self._sequences or ticket_id in self._by_ticket:
            raise InvalidArgument("sequence.sequence_id", request.sequence_id, "is open already")
        if len(self._sequences) >= self._max_open:
            raise ResourceExhausted(f"{self._max_open} sequences are open on this worker")
        self._check_fits(request)
        block_size = self._kv.block_size
        num_tokens = len(request.token_ids)
        hashes = hash_blocks(request.token_ids, block_size, tenant_salt(request.tenant, self._model_digest))
        blocks = self._kv.admit(hashes, max_cached_blocks=(num_tokens - 1) // block_size)
        seq = DecodeSequence(
            session_id=session_id,
            request=request,
            ticket_id=ticket_id,
            serial=self._next_serial,
            blocks=blocks,
            hashes=hashes,
            num_handoff_blocks=-(-num_tokens // block_size),
            token_ids=list(request.token_ids),
            num_verified=blocks.num_cached_blocks,
        )
        self._next_serial += 1
        self._sequences[seq.key] = seq
        self._by_ticket[ticket_id] = seq
        self._watch_deadline(seq)
        return seq

    def close(self, key: Key) -> bool:
        """Let go of a sequence on its owner's word. False if it is not open."""
        seq = self._sequences.get(key)
        if seq is None:
            return False
        self._end(seq, End.CLOSED)
        self._grant_waiting()
        return True

    def close_session(self, session_id: str, end: End = End.CLOSED) -> None:
        """Let go of all sequences of a router process."""
        for seq in [seq for seq in self._sequences.values() if seq.session_id == session_id]:
            self._end(seq, end)
        self._grant_waiting()

    def fail(self, seq: DecodeSequence, error: str) -> None:
        """End one sequence because of an error of its own; no effect if it is gone."""
        if seq.state is not _State.GONE:
            self._end(seq, End.FAILED, error=error)
            self._grant_waiting()

    def expire(self, now_s: float) -> None:
        """End every sequence whose deadline has passed."""
        while (deadline_s := self.next_deadline_s) is not None and deadline_s <= now_s:
            self._end(self._deadlines[0][2], End.DEADLINE)
        self._grant_waiting()

    def lose_all(self) -> None:
        """The ranks are gone and with them every block's content: end all sequences, forget the cache."""
        for seq in list(self._sequences.values()):
            self._end(seq, End.LOST)
        self._kv = self._make_kv()
        self._dying.clear()
        self._in_flight.clear()
        self._leaving_rows.clear()
        self._free_rows = list(range(self._max_rows - 1, -1, -1))

    # The hand-off

    def reserve(self, seq: DecodeSequence) -> bool:
        """Give an open sequence all blocks that its hand-off fills. False: it waits, and `BlocksReserved` follows."""
        if seq.state is _State.OPEN:
            self._waiting.setdefault(seq.serial, seq)
            self._grant_waiting()
        return seq.state is _State.RECEIVING

    def hold(self, seq: DecodeSequence) -> None:
        """A transfer may write to the sequence's blocks from now on."""
        seq.num_holds += 1

    def release_hold(self, seq: DecodeSequence) -> None:
        """A transfer can write no more."""
        self._drop_hold(seq)
        self._grant_waiting()

    def verify(self, seq: DecodeSequence, first_block: int, num_blocks: int) -> None:
        """Blocks of a hand-off are in place; a leading run of them is offered to the prefix cache at once."""
        if seq.state is not _State.RECEIVING:
            return
        seq.verified.update(range(first_block, first_block + num_blocks))
        while seq.num_verified in seq.verified:
            seq.verified.remove(seq.num_verified)
            seq.num_verified += 1
        self._kv.commit(seq.blocks, seq.hashes, min(seq.num_verified, len(seq.hashes)))

    def join(self, seq: DecodeSequence, first_token_id: int, now_s: float) -> None:
        """Everything is in place: the sequence decodes when a row is free."""
        if seq.state is not _State.RECEIVING or seq.num_verified < seq.num_handoff_blocks:
            raise FailedPrecondition(
                f"{seq.num_verified} of {seq.num_handoff_blocks} blocks are verified, the sequence is {seq.state.name}"
            )
        seq.token_ids.append(first_token_id)
        seq.joined_s = now_s
        seq.state = _State.READY
        self._ready[seq.serial] = seq
        reason = seq.request.finish_reason(first_token_id, seq.request.num_output_tokens)
        if reason:
            self._end(seq, End.FINISHED, finish_reason=reason)
            self._grant_waiting()

    # Steps

    def plan(self, now_s: float) -> Plan:
        """The next step, if there is anything to compute and fewer than two plans are in flight."""
        messages: list[AddRow | RemoveRow] = [RemoveRow(row) for row in self._leaving_rows]
        self._free_rows += self._leaving_rows
        self._leaving_rows.clear()
        if len(self._in_flight) >= MAX_PLANS_IN_FLIGHT:
            return Plan(messages, None)
        while self._ready and self._free_rows:
            messages.append(self._give_row(self._ready.pop(next(iter(self._ready))), now_s))
        planned: list[_PlannedRow] = []
        segments: list[Segment] = []
        for seq in sorted(self._rows.values(), key=lambda seq: seq.serial):
            # A sequence may have given way to an older one just now.
            if seq.state is _State.RUNNING and seq.num_planned < seq.max_steps and self._grow(seq):
                planned.append(_PlannedRow(seq, seq.request.num_output_tokens + 1 + seq.num_planned))
                segments.append(self._segment(seq, planned[-1].output_index))
        self._grant_waiting()
        if not segments:
            return Plan(messages, None)
        step = StepPlan(self._next_step_id, segments)
        self._next_step_id += 1
        self._in_flight.append((step.step_id, planned))
        return Plan(messages, step)

    def complete(self, result: StepResult, now_s: float) -> int:
        """Take a plan's tokens, in order of plans. Returns how many were discarded."""
        step_id, planned = self._in_flight.popleft()
        if step_id != result.step_id or len(planned) != len(result.sampled):
            raise InternalError(
                f"step {result.step_id} answered {len(result.sampled)} rows, step {step_id} asked {len(planned)}"
            )
        num_discarded = 0
        for row, sampled in zip(planned, result.sampled, strict=True):
            self._drop_hold(row.seq)
            if row.seq.state is _State.GONE:
                num_discarded += 1
            elif sampled.error:
                self._end(row.seq, End.FAILED, error=sampled.error)
            else:
                self._take_token(row.seq, row.output_index, sampled, now_s)
        self._grant_waiting()
        return num_discarded

    def check_integrity(self) -> None:
        """Verify blocks, rows and queues from scratch. Raises `InternalError`."""
        self._kv.check_integrity()
        used_rows = [*self._rows, *self._free_rows, *self._leaving_rows]
        if sorted(used_rows) != list(range(self._max_rows)):
            raise InternalError("a row is used twice or not at all")
        states = {_State.OPEN: self._waiting, _State.READY: self._ready, _State.RUNNING: self._rows}
        for state, members in states.items():
            if any(seq.state is not state for seq in members.values()):
                raise InternalError(f"a sequence is wrongly listed as {state.name}")
        if {id(seq) for seq in self._sequences.values()} != {id(seq) for seq in self._by_ticket.values()}:
            raise InternalError("sequences and tickets differ")
        if any(seq.state is not _State.GONE or seq.num_holds == 0 for seq in self._dying):
            raise InternalError("a sequence that is not held waits for its last hold")

    # Inside

    def _check_fits(self, request: SequenceRequest) -> None:
        """Alone in the pool, the sequence must be able to reach its last step (whose token needs no block)."""
        num_tokens = self._kv.num_blocks * self._kv.block_size + 1
        limit = num_tokens - request.num_prompt_tokens
        if limit < 1:
            shown = len(request.token_ids)
            raise InvalidArgument("sequence.token_ids", shown, f"at most {num_tokens - 1} tokens fit into the KV cache")
        if request.sampling.max_tokens > limit:
            raise InvalidArgument(
                "sampling.max_tokens", request.sampling.max_tokens, f"at most {limit}: the KV cache holds no more"
            )

    def _watch_deadline(self, seq: DecodeSequence) -> None:
        if len(self._deadlines) > 2 * self._max_open:  # most are of sequences that are gone
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not _State.GONE]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (seq.request.deadline_s, seq.serial, seq))

    def _give_row(self, seq: DecodeSequence, now_s: float) -> AddRow:
        seq.row = self._free_rows.pop()
        seq.state = _State.RUNNING
        seq.first_step_s = seq.last_token_s = now_s
        self._rows[seq.row] = seq
        num_prompt = seq.request.num_prompt_tokens
        return AddRow(seq.row, seq.request.sampling, seq.token_ids[:num_prompt], seq.token_ids[num_prompt:])

    def _segment(self, seq: DecodeSequence, output_index: int) -> Segment:
        new_block_ids = seq.blocks.block_ids[seq.num_blocks_sent :]
        seq.num_blocks_sent = len(seq.blocks.block_ids)
        position = seq.num_handoff_tokens + seq.num_planned
        seq.num_planned += 1
        seq.num_holds += 1
        return Segment(seq.row, None, position, new_block_ids, True, output_index)

    def _grow(self, seq: DecodeSequence) -> bool:
        """See to a block for the next token's KV. False: the sequence sits this step out, or had to leave."""
        position = seq.num_handoff_tokens + seq.num_planned
        num_blocks = position // self._kv.block_size + 1
        while not self._kv.extend(seq.blocks, num_blocks):
            # Blocks of those that are gone come back within a step: no need for another victim.
            if self._dying or not self._make_room(seq):
                return False
        return True

    def _make_room(self, seq: DecodeSequence) -> bool:
        """Preempt one sequence in favour of `seq`. False if it had to be `seq` itself."""
        decoding = [*self._rows.values(), *self._ready.values()]
        victim = max(decoding, key=lambda other: other.serial)
        if victim is seq and len(decoding) == 1:
            victim = self._idlest(seq)
        self._end(victim, End.PREEMPTED)
        return victim is not seq

    def _idlest(self, seq: DecodeSequence) -> DecodeSequence:
        """The youngest that only holds cached blocks, else the youngest that is receiving."""
        for state in (_State.OPEN, _State.RECEIVING):
            others = [other for other in self._sequences.values() if other.state is state and other.blocks.block_ids]
            if others := [other for other in others if other is not seq]:
                return max(others, key=lambda other: other.serial)
        # It received blocks that another had at the same time, and holds those too (see KVCacheManager). When it
        # comes back, it finds them in the cache.
        assert seq.blocks.anchors, "a sequence that fits alone has no block, and nobody else holds any"
        return seq

    def _take_token(self, seq: DecodeSequence, output_index: int, sampled: SampledToken, now_s: float) -> None:
        seq.num_stepped += 1
        seq.token_ids.append(sampled.token_id)
        seq.last_token_s = now_s
        top_logprobs = sampled.top_logprobs or []
        self._events.append(TokenSampled(seq.key, output_index, sampled.token_id, sampled.logprob, top_logprobs))
        reason = seq.request.finish_reason(sampled.token_id, output_index)
        if reason:
            self._end(seq, End.FINISHED, finish_reason=reason)

    def _end(self, seq: DecodeSequence, end: End, finish_reason: int = 0, error: str = "") -> None:
        """The one way out of every state."""
        assert seq.state is not _State.GONE
        if seq.state in (_State.READY, _State.RUNNING) and end not in (End.FAILED, End.LOST):
            self._commit_all(seq)
        if seq.state is _State.RUNNING:
            del self._rows[seq.row]
            self._leaving_rows.append(seq.row)
        self._waiting.pop(seq.serial, None)
        self._ready.pop(seq.serial, None)
        del self._sequences[seq.key]
        del self._by_ticket[seq.ticket_id]
        seq.state = _State.GONE
        queue_s = seq.first_step_s - seq.joined_s if seq.first_step_s else 0.0
        decode_s = seq.last_token_s - seq.first_step_s
        self._events.append(
            SequenceEnded(
                seq.key, seq.ticket_id, end, finish_reason, error, round(queue_s * 1e9), round(decode_s * 1e9)
            )
        )
        if seq.num_holds:
            self._dying.add(seq)
        else:
            self._kv.release(seq.blocks)

    def _commit_all(self, seq: DecodeSequence) -> None:
        """Offer every full block to the prefix cache: a next turn, or the sequence itself, may come back to it.

        A plan in flight writes behind these blocks only.
        """
        block_size = self._kv.block_size
        num_full = (seq.num_handoff_tokens + seq.num_stepped) // block_size
        parent = seq.hashes[-1] if seq.hashes else root_hash(tenant_salt(seq.request.tenant, self._model_digest))
        for index in range(len(seq.hashes), num_full):
            parent = hash_block(parent, seq.token_ids[index * block_size : (index + 1) * block_size])
            seq.hashes.append(parent)
        self._kv.commit(seq.blocks, seq.hashes, num_full)

    def _drop_hold(self, seq: DecodeSequence) -> None:
        seq.num_holds -= 1
        assert seq.num_holds >= 0
        if seq.num_holds == 0 and seq in self._dying:  # not in it if the ranks were lost since
            self._dying.remove(seq)
            self._kv.release(seq.blocks)

    def _grant_waiting(self) -> None:
        """Give blocks to those that wait for them, in order. Called whenever blocks may have come free."""
        while self._waiting:
            seq = next(iter(self._waiting.values()))
            if self._take_blocks(seq):
                del self._waiting[seq.serial]
                seq.state = _State.RECEIVING
                self._events.append(BlocksReserved(seq.ticket_id))
            elif self._num_active or self._dying:
                return  # they finish, and then there are blocks
            else:
                self._end(self._idlest(seq), End.PREEMPTED)  # only cached blocks held by open sequences are in the way

    @property
    def _num_active(self) -> int:
        """Sequences that hold all their blocks and will need more."""
        return len(self._sequences) - sum(1 for seq in self._sequences.values() if seq.state is _State.OPEN)

    def _take_blocks(self, seq: DecodeSequence) -> bool:
        """Leaves a block for each active sequence to grow into: a newcomer must not force a preemption at once."""
        num_new = seq.num_handoff_blocks - len(seq.blocks.block_ids)
        if num_new + self._num_active > self._kv.num_available:
            return False
        return self._kv.extend(seq.blocks, seq.num_handoff_blocks)


def blocks_of(seq: DecodeSequence, first_block: int, num_blocks: int) -> Sequence[int]:
    """Ids of a run of a sequence's blocks."""
    return seq.blocks.block_ids[first_block : first_block + num_blocks]
