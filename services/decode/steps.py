"""What the sequences that have rows compute in the next step, and what becomes of the answers. Pure.

Up to two plans are in flight: plan n+1 is made while n runs, and takes the token that n samples from the device. So
an end is seen one step late, and the token of that step is discarded.

A sequence whose prompt is computed here (*local*) comes in chunks: beside the decoding rows a step computes up to
`chunk_tokens` prompt tokens, of the oldest prompts first (mixed steps after Sarathi-Serve, OSDI'24).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from common.worker.step_plan import SampledToken, StepPlan, StepResult
from services.decode.block_ledger import BlockLedger
from services.decode.plans import Chunk, PlansInFlight
from services.decode.request import DecodeSequence, End, Event, SequenceState, StepsBegin, TokenSampled
from services.decode.row_table import RowTable


class EndSequence(Protocol):
    """The one way out of every state."""

    def __call__(self, seq: DecodeSequence, end: End, finish_reason: int = 0, error: str = "") -> None: ...


class Steps:
    """Plans and answers. Blocks, rows and the list of events are the scheduler's.

    `make_room` preempts somebody in favour of a sequence, and says False if that had to be the sequence itself.
    """

    def __init__(
        self,
        blocks: BlockLedger,
        rows: RowTable,
        chunk_tokens: int,
        make_room: Callable[[DecodeSequence], bool],
        end: EndSequence,
        events: list[Event],
    ) -> None:
        self._blocks = blocks
        self._rows = rows
        self._chunk_tokens = chunk_tokens
        self._make_room = make_room
        self._end = end
        self._events = events
        self._in_flight = PlansInFlight()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def is_full(self) -> bool:
        """Whether the ranks have as many plans as they may."""
        return self._in_flight.is_full

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step; None if there is nothing to compute."""
        oldest_first = sorted(self._rows.sequences, key=lambda seq: seq.serial)
        decoding: list[DecodeSequence] = []
        for seq in oldest_first:
            # A sequence may have given way to an older one just now.
            if seq.state is SequenceState.RUNNING and seq.wants_step and self._grow(seq):
                self._blocks.hold(seq)
                decoding.append(seq)
        chunks = self._chunks(oldest_first, now_s)
        if not decoding and not chunks:
            return None
        step = self._in_flight.submit(decoding, chunks)
        self._announce()
        return step

    def complete(self, result: StepResult, now_s: float) -> int:
        """Take a plan's tokens, in order of plans. Returns how many were discarded."""
        num_discarded = 0
        for planned, sampled in self._in_flight.take(result):
            seq = planned.seq
            self._blocks.drop_hold(seq)
            if seq.state is SequenceState.GONE:
                num_discarded += sampled is not None
            elif sampled is not None and sampled.error:
                self._end(seq, End.FAILED, error=sampled.error)
            elif planned.chunk is not None:
                self._take_chunk(planned.chunk, sampled, now_s)
            elif sampled is not None:
                seq.num_stepped += 1
                self._take_token(seq, planned.output_index, sampled, now_s)
        self._announce()
        return num_discarded

    def forget_all(self) -> None:
        """The ranks are gone."""
        self._in_flight.forget_all()

    def _chunks(self, oldest_first: list[DecodeSequence], now_s: float) -> list[Chunk]:
        """Prompt tokens for the next step, held. Their blocks were given all together."""
        budget, chunks = self._chunk_tokens, []
        for seq in oldest_first:
            num_tokens = min(seq.num_unplanned_tokens, budget)
            if num_tokens and seq.state is SequenceState.RUNNING:
                seq.scheduled_s = seq.scheduled_s or now_s
                self._blocks.hold(seq)
                chunks.append(Chunk(seq, seq.num_chunked, seq.num_chunked + num_tokens))
                budget -= num_tokens
        return chunks

    def _grow(self, seq: DecodeSequence) -> bool:
        """See to a block for the next token's KV. False: the sequence sits this step out, or had to leave."""
        position = seq.num_handoff_tokens + seq.num_planned
        num_blocks = position // self._blocks.block_size + 1
        while not self._blocks.extend(seq, num_blocks):
            # Blocks of those that are gone come back within a step: no need for another victim.
            if self._blocks.has_dying or not self._make_room(seq):
                return False
        return True

    def _announce(self) -> None:
        """Say of which sequences the first step is under way: their first tokens may go, evenly spaced."""
        for planned in self._in_flight.under_way:
            seq = planned.seq
            if not (seq.is_announced or seq.is_local or seq.state is SequenceState.GONE):
                seq.is_announced = True
                self._events.append(StepsBegin(seq.key))

    def _take_chunk(self, chunk: Chunk, sampled: SampledToken | None, now_s: float) -> None:
        """Tokens of a local prompt are in place; with the last of them comes the first token."""
        seq = chunk.seq
        seq.num_computed = chunk.end
        self._blocks.commit_computed(seq)
        if sampled is not None:
            seq.joined_s = seq.first_step_s = now_s
            self._events.append(seq.prompt_computed(self._blocks.block_size))
            self._take_token(seq, seq.request.num_output_tokens, sampled, now_s)

    def _take_token(self, seq: DecodeSequence, output_index: int, sampled: SampledToken, now_s: float) -> None:
        seq.token_ids.append(sampled.token_id)
        seq.last_token_s = now_s
        top_logprobs = sampled.top_logprobs or []
        self._events.append(TokenSampled(seq.key, output_index, sampled.token_id, sampled.logprob, top_logprobs))
        if reason := seq.request.finish_reason(sampled.token_id, output_index):
            self._end(seq, End.FINISHED, finish_reason=reason)
