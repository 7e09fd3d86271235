"""The rows of a rank as the host sees them: block tables, and why a segment of a plan cannot run.

Bounds are checked here before anything is computed: a segment that breaks them gets an error of its own, the others
run. Knows neither tensors nor sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from common.errors import InternalError
from common.worker.step_plan import TOKEN_BYTES, Segment, StepPlan


@dataclass(slots=True)
class Row:
    """A sequence's state besides sampling."""

    has_last_token: bool
    block_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What a segment is held against."""

    context_length: int
    vocab_size: int
    num_blocks: int
    block_size: int


class RowTable:
    """Which rows are taken, and their block tables."""

    def __init__(self, max_rows: int, limits: RowLimits) -> None:
        self._rows: list[Row | None] = [None] * max_rows
        self._limits = limits

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        state = self._rows[row]
        assert state is not None
        return state

    def require_free(self, row: int) -> None:
        """Raises `InternalError` if the row is taken."""
        if self._rows[row] is not None:
            raise InternalError(f"row {row} is taken")

    def add(self, row: int, has_last_token: bool) -> None:
        """Take a free row, with an empty block table."""
        self.require_free(row)
        self._rows[row] = Row(has_last_token)

    def remove(self, row: int) -> None:
        """Give the row back."""
        if self._rows[row] is None:
            raise InternalError(f"row {row} is not taken")
        self._rows[row] = None

    def check(self, plan: StepPlan) -> tuple[list[Segment], dict[int, str]]:
        """The segments that can run, in the plan's order, and the errors of the others by row."""
        if len({segment.row for segment in plan.segments}) < len(plan.segments):
            raise InternalError(f"step {plan.step_id} has two segments for one row")
        runnable: list[Segment] = []
        errors: dict[int, str] = {}
        for segment in plan.segments:
            error = self._refusal(segment)
            if error:
                errors[segment.row] = error
            else:
                runnable.append(segment)
        return runnable, errors

    def _refusal(self, segment: Segment) -> str:
        """Why the segment cannot run, or nothing."""
        row = self._rows[segment.row] if 0 <= segment.row < len(self._rows) else None
        limits = self._limits
        if row is None:
            return f"row {segment.row} holds no sequence"
        end = segment.position + segment.num_tokens
        num_blocks = len(row.block_ids) + len(segment.new_block_ids)
        if segment.position < 0 or segment.num_tokens < 1:
            return f"{segment.num_tokens} tokens at position {segment.position}"
        if end > limits.context_length:
            return f"position {end - 1} is beyond the context of {limits.context_length} tokens"
        if end > num_blocks * limits.block_size:
            return f"{num_blocks} blocks do not cover {end} tokens"
        if _outside(segment.new_block_ids, limits.num_blocks):
            return f"a block id is not within {limits.num_blocks} blocks"
        if segment.token_ids is None:
            return "" if row.has_last_token else "the row has sampled no token yet"
        if len(segment.token_ids) % TOKEN_BYTES:
            return f"{len(segment.token_ids)} bytes are not packed token ids"
        if np.frombuffer(segment.token_ids, dtype=np.uint32).max() >= limits.vocab_size:
            return f"a token id is not within the vocabulary of {limits.vocab_size}"
        return ""


def _outside(ids: list[int], limit: int) -> bool:
    return bool(ids) and not 0 <= min(ids) <= max(ids) < limit
