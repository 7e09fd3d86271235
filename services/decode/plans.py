"""The plans that the ranks have and whose results are not back: which row of a result is whose next token. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import InternalError
from common.worker.step_plan import AddRow, RemoveRow, SampledToken, Segment, StepPlan, StepResult
from services.decode.request import DecodeSequence

MAX_PLANS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What to tell the ranks, in order: rows that change hands, then at most one step."""

    messages: list[AddRow | RemoveRow]
    step: StepPlan | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [begin, end) of a sequence that is computed here."""

    seq: DecodeSequence
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.seq.num_handoff_tokens


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of a plan: a decode step of its sequence, or a chunk of its prompt."""

    seq: DecodeSequence
    row: int  # at the time of the plan
    output_index: int  # of the token that is sampled
    chunk: Chunk | None = None

    @property
    def samples(self) -> bool:
        return self.chunk is None or self.chunk.is_last


class PlansInFlight:
    """Oldest first: results come back in the order of the plans."""

    def __init__(self) -> None:
        self._plans: deque[tuple[int, list[PlannedRow]]] = deque()
        self._next_step_id = 0

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def is_full(self) -> bool:
        return len(self._plans) >= MAX_PLANS_IN_FLIGHT

    @property
    def under_way(self) -> Sequence[PlannedRow]:
        """The rows of the oldest plan: it is computed now, or next."""
        return self._plans[0][1] if self._plans else ()

    def submit(self, sequences: Sequence[DecodeSequence], chunks: Sequence[Chunk] = ()) -> StepPlan:
        """One more token for each of the sequences, whose blocks reach far enough, and the chunks."""
        rows = [PlannedRow(s, s.row, s.request.num_output_tokens + 1 + s.num_planned) for s in sequences]
        rows += [PlannedRow(c.seq, c.seq.row, c.seq.request.num_output_tokens, c) for c in chunks]
        step = StepPlan(self._next_step_id, [_segment(row) for row in rows])
        self._next_step_id += 1
        self._plans.append((step.step_id, rows))
        return step

    def take(self, result: StepResult) -> Iterable[tuple[PlannedRow, SampledToken | None]]:
        """The oldest plan's result: each of its rows, and the token or error of it (None: a chunk that is done)."""
        step_id, rows = self._plans.popleft()
        tokens = {token.row: token for token in result.sampled}
        answered = [(row, tokens.pop(row.row, None)) for row in rows]
        if step_id != result.step_id or tokens or any(token is None and row.samples for row, token in answered):
            raise InternalError(f"step {result.step_id} does not answer the rows that step {step_id} asked")
        return answered

    def forget_all(self) -> None:
        """The ranks are gone."""
        self._plans.clear()


def _segment(planned: PlannedRow) -> Segment:
    seq, chunk = planned.seq, planned.chunk
    new_block_ids = seq.blocks.block_ids[seq.num_blocks_sent :]
    seq.num_blocks_sent = len(seq.blocks.block_ids)
    if chunk is not None:
        token_ids = seq.request.token_ids[chunk.begin : chunk.end].tobytes()
        seq.num_chunked = chunk.end
        return Segment(planned.row, token_ids, chunk.begin, new_block_ids, chunk.is_last, planned.output_index)
    position = seq.num_handoff_tokens + seq.num_planned
    seq.num_planned += 1
    return Segment(planned.row, None, position, new_block_ids, True, planned.output_index)
