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
class _PlannedRow:
    seq: DecodeSequence
    output_index: int


class PlansInFlight:
    """Oldest first: results come back in the order of the plans."""

    def __init__(self) -> None:
        self._plans: deque[tuple[int, list[_PlannedRow]]] = deque()
        self._next_step_id = 0

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def is_full(self) -> bool:
        return len(self._plans) >= MAX_PLANS_IN_FLIGHT

    def submit(self, sequences: Sequence[DecodeSequence]) -> StepPlan:
        """One more token for each of these, whose blocks reach far enough."""
        rows = [_PlannedRow(seq, seq.request.num_output_tokens + 1 + seq.num_planned) for seq in sequences]
        step = StepPlan(self._next_step_id, [_segment(row) for row in rows])
        self._next_step_id += 1
        self._plans.append((step.step_id, rows))
        return step

    def take(self, result: StepResult) -> Iterable[tuple[DecodeSequence, int, SampledToken]]:
        """The oldest plan's result: each sequence, the index of its token in the output, and the token."""
        step_id, rows = self._plans.popleft()
        if step_id != result.step_id or len(rows) != len(result.sampled):
            raise InternalError(
                f"step {result.step_id} answered {len(result.sampled)} rows, step {step_id} asked {len(rows)}"
            )
        return [(row.seq, row.output_index, token) for row, token in zip(rows, result.sampled, strict=True)]

    def forget_all(self) -> None:
        """The ranks are gone."""
        self._plans.clear()


def _segment(row: _PlannedRow) -> Segment:
    seq = row.seq
    new_block_ids = seq.blocks.block_ids[seq.num_blocks_sent :]
    seq.num_blocks_sent = len(seq.blocks.block_ids)
    position = seq.num_handoff_tokens + seq.num_planned
    seq.num_planned += 1
    return Segment(seq.row, None, position, new_block_ids, True, row.output_index)
