"""Runs step plans on one rank: rows, their block tables and last tokens, one ragged forward pass, one sampling pass.

Logits are gathered on every rank and sampling is a function of them and of counters, so that all ranks choose the same
token without telling each other. Bounds are checked before anything is computed: a segment that breaks them gets an
error of its own, the others run. Decides nothing: which rows run, and in which blocks, is the plan's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from common.kernels.batch import Span
from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder
from common.sampling.sampler import BatchSampler, SampleOutput
from common.worker.row_table import RowLimits, RowTable
from common.worker.step_marks import StepMarks
from common.worker.step_plan import (
    AddRow,
    SampledToken,
    Segment,
    StepPlan,
    StepResult,
    no_token,
    not_finite,
    unpack_tokens,
)


class Pending(Protocol):
    """A step that has been launched. Its tokens are on the device and already are the next step's input."""

    def result(self) -> StepResult:
        """Wait for the device and read back what was sampled. Called once."""
        ...


class Runner(Protocol):
    """One rank's part of a worker's engine. Not thread-safe, except that results may be awaited in another thread."""

    def add_row(self, message: AddRow) -> None:
        """Give the row to a sequence and rebuild its sampling state."""
        ...

    def remove_row(self, row: int) -> None:
        """Take the row back."""
        ...

    def launch(self, plan: StepPlan) -> Pending:
        """Enqueue a step on the device; on a device that runs asynchronously this returns before it is done."""
        ...


def row_limits(decoder: Decoder, storage: KVStorage) -> RowLimits:
    """The bounds that a decoder and its storage set to segments."""
    config, shape = decoder.config, storage.shape
    return RowLimits(config.context_length, config.vocab_size, shape.num_blocks, shape.block_size)


@dataclass(frozen=True, slots=True)
class Computed:
    """What the forward pass of a step left on the device."""

    segments: list[Segment]
    is_finite: torch.Tensor  # [T] bool, tokens in the order of the segments: whether K and V were

    def not_finite_rows(self) -> list[int]:
        """Rows whose chunks stored zeros instead of numbers. Of rows that decode the logits say so."""
        if bool(self.is_finite.all()):
            return []
        rows, end = [], 0
        for segment in self.segments:
            start, end = end, end + segment.num_tokens
            if not segment.decodes and not bool(self.is_finite[start:end].all()):
                rows.append(segment.row)
        return rows


class PendingStep:
    """A step whose sampled tokens are on the device."""

    def __init__(
        self,
        plan: StepPlan,
        errors: dict[int, str],
        computed: Computed | None,
        sampled: list[Segment],
        output: SampleOutput | None,
        started_ns: int,
    ) -> None:
        self._plan = plan
        self._errors = errors
        self._computed = computed
        self._sampled = sampled
        self._output = output
        self._started_ns = started_ns

    def result(self) -> StepResult:
        """Wait for the device and read back what was sampled."""
        by_row = {row: SampledToken(row, -1, error=error) for row, error in self._errors.items()}
        if self._output is not None:
            invalid = self._output.invalid
            values = zip(self._sampled, self._output.token_ids.tolist(), self._output.logprobs, strict=True)
            for index, (segment, token_id, logprobs) in enumerate(values):
                if index in invalid:
                    by_row[segment.row] = no_token(segment.row)
                elif logprobs is None:
                    by_row[segment.row] = SampledToken(segment.row, token_id)
                else:
                    by_row[segment.row] = SampledToken(segment.row, token_id, logprobs[0], logprobs[1])
        if self._computed is not None:
            by_row |= {row: not_finite(row) for row in self._computed.not_finite_rows()}
        sampled = [by_row[segment.row] for segment in self._plan.segments if segment.row in by_row]
        return StepResult(self._plan.step_id, sampled, time.perf_counter_ns() - self._started_ns)


class ModelRunner:
    """One rank's part of a worker's engine. Not thread-safe: everything is called from the step thread."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        sampler: BatchSampler,
        max_rows: int,
        marks: StepMarks | None = None,
    ) -> None:
        """`marks` [none] learns which layers of a step have stored their K and V."""
        self._decoder = decoder
        self._marks = marks
        self._storage = storage
        self._sampler = sampler
        self._shape = storage.shape
        self._windows = frozenset(decoder.config.windows)
        self._rows = RowTable(max_rows, row_limits(decoder, storage))
        self._last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=decoder.device)

    def add_row(self, message: AddRow) -> None:
        """Give the row to a sequence and rebuild its sampling state."""
        self._rows.require_free(message.row)
        prompt, outputs = unpack_tokens(message.prompt_token_ids), unpack_tokens(message.output_token_ids)
        self._sampler.add(message.row, message.sampling, prompt, outputs)
        self._rows.add(message.row, has_last_token=bool(outputs))
        if outputs:
            self._last_tokens[message.row] = outputs[-1]

    def remove_row(self, row: int) -> None:
        """Take the row back."""
        self._rows.remove(row)
        self._sampler.remove(row)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step and wait for its tokens."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueue a step on the device; on a device that runs asynchronously this returns before it is done."""
        if self._marks is None:
            return self._launch(plan)
        self._marks.begin(plan.step_id)
        try:
            return self._launch(plan)
        finally:
            self._marks.end()

    def _launch(self, plan: StepPlan) -> PendingStep:
        started_ns = time.perf_counter_ns()
        accepted, errors = self._rows.check(plan)
        runnable = [(segment, self._span(segment)) for segment in accepted]
        if not runnable:
            return PendingStep(plan, errors, None, [], None, started_ns)
        # Decode first and by context length: attention takes neighbours together and pads to the longest.
        runnable.sort(key=_decode_first)
        hidden = self._forward(runnable)
        sampled = [segment for segment, _ in runnable if segment.sample]
        output = self._sample(hidden, runnable, sampled) if sampled else None
        computed = Computed([segment for segment, _ in runnable], hidden[:, 0].isfinite())
        return PendingStep(plan, errors, computed, sampled, output, started_ns)

    def _forward(self, batch: list[tuple[Segment, Span]]) -> torch.Tensor:
        """Returns [T, hidden], tokens in the order of the batch."""
        decoder = self._decoder
        positions = [
            position
            for segment, span in batch
            for position in range(segment.position, segment.position + span.num_queries)
        ]
        plan = decoder.kernels.plan_batch(
            [span for _, span in batch], self._windows, self._shape, decoder.dtype, decoder.device
        )
        on_stored = None if self._marks is None else self._marks.stored
        return decoder.forward(self._input_ids(batch), self._tensor(positions), plan, self._storage.kv, on_stored)

    def _input_ids(self, batch: list[tuple[Segment, Span]]) -> torch.Tensor:
        """[T] int64: given tokens from the plan, the others from what the rows sampled last."""
        given: list[int] = []
        places: list[int] = []
        rows: list[int] = []
        for segment, _ in batch:
            if segment.token_ids is None:
                places.append(len(given))
                rows.append(segment.row)
                given.append(0)
            else:
                given.extend(unpack_tokens(segment.token_ids))
        if len(rows) == len(given):
            return self._last_tokens.index_select(0, self._tensor(rows))
        token_ids = self._tensor(given)
        if rows:
            last = self._last_tokens.index_select(0, self._tensor(rows))
            token_ids.index_copy_(0, self._tensor(places), last)
        return token_ids

    def _sample(self, hidden: torch.Tensor, batch: list[tuple[Segment, Span]], sampled: list[Segment]) -> SampleOutput:
        """hidden: [T, hidden]. Sampled tokens become their rows' last tokens."""
        ends: list[int] = []
        end = 0
        for segment, span in batch:
            end += span.num_queries
            if segment.sample:
                ends.append(end - 1)
        if len(ends) < hidden.shape[0]:
            hidden = hidden.index_select(0, self._tensor(ends))
        rows = [segment.row for segment in sampled]
        output = self._sampler.sample(rows, self._decoder.logits(hidden), [segment.output_index for segment in sampled])
        self._last_tokens.index_copy_(0, self._tensor(rows), output.token_ids)
        for row in rows:
            self._rows[row].has_last_token = True
        return output

    def _span(self, segment: Segment) -> Span:
        """The segment's place in attention. Appends its new blocks to the row's table."""
        row = self._rows[segment.row]
        row.block_ids += segment.new_block_ids
        return Span(segment.num_tokens, segment.position + segment.num_tokens, row.block_ids)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._decoder.device)


def _decode_first(item: tuple[Segment, Span]) -> tuple[bool, int]:
    span = item[1]
    return span.num_queries > 1, span.context_length
