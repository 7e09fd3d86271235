"""Ranks without tensors: they execute plans as late as the protocol allows and check every token they read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.worker.step_plan import AddRow, RemoveRow, SampledToken, Segment, StepPlan, StepResult, unpack_tokens
from tests.decode.requests import token_of


@dataclass(slots=True)
class _Row:
    seed: int
    tokens: list[int]
    num_prompt: int
    block_ids: list[int]


class FakeRanks:
    """KV memory holds token ids. A plan runs when its result is asked for, after whatever was written meanwhile."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.memory = [[-1] * block_size for _ in range(num_blocks)]
        self._block_size = block_size
        self._rows: dict[int, _Row] = {}
        self._queue: deque[AddRow | RemoveRow | StepPlan] = deque()

    def submit(self, messages: Sequence[AddRow | RemoveRow | StepPlan]) -> None:
        self._queue.extend(messages)

    def write(self, block_ids: Sequence[int], first_block: int, token_ids: Sequence[int]) -> None:
        """What a hand-off scatters: the tokens of a run of blocks."""
        for index, block_id in enumerate(block_ids, start=first_block):
            start = index * self._block_size
            for offset, token in enumerate(token_ids[start : start + self._block_size]):
                self.memory[block_id][offset] = token

    def run_next(self, failing_rows: int = 0) -> StepResult:
        """Execute up to and including the next plan; the first `failing_rows` of it report an error."""
        while not isinstance(message := self._queue.popleft(), StepPlan):
            self._apply(message)
        answers = [self._step(segment) for segment in message.segments]
        for index in range(min(failing_rows, len(answers))):
            answers[index] = SampledToken(message.segments[index].row, -1, error="logits are not finite")
        return StepResult(message.step_id, [answer for answer in answers if answer is not None], 1)

    def _apply(self, message: AddRow | RemoveRow) -> None:
        if isinstance(message, RemoveRow):
            del self._rows[message.row]
            return
        assert message.row not in self._rows, "a row was given to two sequences"
        prompt, output = unpack_tokens(message.prompt_token_ids), unpack_tokens(message.output_token_ids)
        self._rows[message.row] = _Row(message.sampling.seed, [*prompt, *output], len(prompt), [])

    def _step(self, segment: Segment) -> SampledToken | None:
        row = self._rows[segment.row]
        row.block_ids += segment.new_block_ids
        end = segment.position + segment.num_tokens
        if segment.token_ids is None:
            assert end == len(row.tokens), "the input is not the last token"
        else:
            assert [*unpack_tokens(segment.token_ids)] == row.tokens[segment.position : end], (
                "these are not the prompt's tokens"
            )
            assert segment.sample == (end == len(row.tokens)), "a token is sampled behind the last chunk only"
        for position in range(segment.position, end):
            block_id = row.block_ids[position // self._block_size]
            self.memory[block_id][position % self._block_size] = row.tokens[position]
        for position, token in enumerate(row.tokens[:end]):
            found = self.memory[row.block_ids[position // self._block_size]][position % self._block_size]
            assert found == token, f"position {position} holds {found}, not {token}: its block was given away"
        if not segment.sample:
            return None
        assert segment.output_index == len(row.tokens) - row.num_prompt
        row.tokens.append(token_of(row.seed, segment.output_index))
        return SampledToken(segment.row, row.tokens[-1])
