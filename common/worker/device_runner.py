"""Runs step plans on a GPU without waiting for it: rows' tables and last tokens live there, plans carry what is new.

A step in which every row decodes one token is a captured graph behind one small copy, and on workers that compute
prompts beside that, so is one with chunks; all others run kernel by kernel. Answers are copied to the host behind the
step and can be awaited in another thread. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from common.kernels import triton_step
from common.kernels.batch import Span
from common.kernels.cuda_backend import table_columns
from common.kernels.upload import overwrite, upload
from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder
from common.sampling.device_sampler import DeviceSampler
from common.sampling.params import SamplingParams
from common.worker.decode_graphs import DecodeGraphs, StepOutput, batch_sizes
from common.worker.device_step import DeviceStep, StepClock
from common.worker.graph_capture import GraphCapture
from common.worker.mixed_graphs import MixedGraphs, chunk_sizes, prompt_sizes, row_sizes
from common.worker.mixed_step import MixedSize, fill
from common.worker.model_runner import row_limits
from common.worker.row_table import RowTable
from common.worker.step_marks import StepMarks
from common.worker.step_plan import (
    TOKEN_BYTES,
    AddRow,
    Segment,
    StepPlan,
    StepResult,
    pack_tokens,
    unpack_tokens,
)

_WARM_UP_STEP: Final = -1  # before any plan's: whoever waits for step 0 must not be told of this one


class DeviceRunner:
    """One rank's part of a worker's engine. All but `DeviceStep.result` is called from the step thread."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        max_rows: int,
        graph_sizes: tuple[int, ...] | None = None,
        marks: StepMarks | None = None,
        chunk_tokens: int = 0,
        prompts_alone: bool = False,
    ) -> None:
        """Captures the decode steps; `graph_sizes` [empty: none]. `marks` [none] learns what the other steps store.

        `chunk_tokens`: captures steps with up to so many tokens of prompts as well [0: none]: beside rows that decode
        and without, or, with `prompts_alone`, without them only and in finer sizes.
        """
        self._decoder = decoder
        self._marks = marks
        self._storage = storage
        self._shape = storage.shape
        self._windows = frozenset(decoder.config.windows)
        self._rows = RowTable(max_rows, row_limits(decoder, storage))
        self._sampler = DeviceSampler(decoder.config.vocab_size, max_rows, decoder.device)
        max_blocks = -(-decoder.config.context_length // self._shape.block_size)
        self._columns = table_columns(max_blocks)
        self._row_tables = torch.zeros((max_rows + 1, self._columns), dtype=torch.int32, device=decoder.device)
        sizes = batch_sizes(max_rows) if graph_sizes is None else graph_sizes
        capture = GraphCapture(decoder.device)
        own = decoder, storage, self._sampler, self._row_tables
        self._mixed = None
        if chunk_tokens:
            alone = (0,), prompt_sizes(chunk_tokens)
            chunks = alone if prompts_alone else (row_sizes(max_rows), chunk_sizes(chunk_tokens))
            self._mixed = MixedGraphs(*own, *chunks, capture)
        self._graphs = DecodeGraphs(*own, sizes, capture) if sizes else None

    def warm_up(self, max_tokens: int) -> None:
        """Run the largest step and the smallest, in blocks that nobody uses yet, to compile kernels and take memory."""
        shape, context_length = self._shape, self._decoder.config.context_length
        for num_tokens in (min(max_tokens, shape.num_blocks * shape.block_size, context_length), 1):
            blocks = list(range(-(-num_tokens // shape.block_size)))
            self.add_row(AddRow(0, SamplingParams(max_tokens=1, seed=0), pack_tokens([0]), b""))
            plan = StepPlan(_WARM_UP_STEP, [Segment(0, bytes(num_tokens * TOKEN_BYTES), 0, blocks, True, 0)])
            self._launch(plan, captured=False).result()
            self.remove_row(0)

    def add_row(self, message: AddRow) -> None:
        """Give the row to a sequence and rebuild its sampling state."""
        self._rows.require_free(message.row)
        prompt, outputs = unpack_tokens(message.prompt_token_ids), unpack_tokens(message.output_token_ids)
        fields = self._sampler.add(message.row, message.sampling, prompt, outputs)
        self._rows.add(message.row, has_last_token=bool(outputs))
        overwrite(self._sampler.row_state[message.row], fields)

    def remove_row(self, row: int) -> None:
        """Take the row back."""
        self._rows.remove(row)
        self._sampler.remove(row)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step and wait for its tokens."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> DeviceStep:
        """Enqueue a step; returns long before it is done."""
        return self._launch(plan, captured=True)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, captured: bool) -> DeviceStep:
        """`captured`: by a graph, if there is one for the step."""
        segments, errors = self._rows.check(plan)
        clock = StepClock(self._decoder.device)
        step = DeviceStep(plan, errors, clock)
        if self._marks is not None:
            self._marks.begin(plan.step_id)
        if segments and not (captured and self._run_captured(segments, step)):
            self._run_eagerly(segments, step)
        clock.stop()
        if self._marks is not None:
            self._marks.end()
        return step

    def _run_captured(self, segments: list[Segment], step: DeviceStep) -> bool:
        """Replay the graph that holds the step; False, and nothing done, if none does."""
        decoding = [segment for segment in segments if segment.decodes]
        if len(decoding) == len(segments):
            if self._graphs is None or len(segments) > self._graphs.max_size:
                return False
            self._decode(self._graphs, segments, step)
            return True
        chunks = [segment for segment in segments if not segment.decodes]
        size = None if self._mixed is None else self._mixed.size_for(decoding, chunks)
        if self._mixed is None or size is None:
            return False
        self._run_mixed(self._mixed, size, decoding, chunks, step)
        return True

    def _decode(self, graphs: DecodeGraphs, segments: list[Segment], step: DeviceStep) -> None:
        """One captured step without chunks."""
        size = graphs.size_for(len(segments))
        packed = np.full((triton_step.NUM_FIELDS, size), -1, dtype=np.int32)
        packed[triton_step.ROW] = len(self._rows)  # the spare row
        packed[triton_step.LENGTH] = 0
        packed[triton_step.OUTPUT_INDEX] = 0
        extra = self._pack(segments, packed)
        if extra:
            self._extend_tables(extra)
        overwrite(graphs.packed(size), packed)
        self._answer(step, segments, [], graphs.run(size))

    def _run_mixed(
        self,
        graphs: MixedGraphs,
        size: MixedSize,
        decoding: list[Segment],
        chunks: list[Segment],
        step: DeviceStep,
    ) -> None:
        """One captured step with chunks."""
        flat, fields = graphs.blank(size)
        extra = self._pack(decoding, fields.decode)
        extra += [entry for chunk in chunks for entry in self._extend(chunk)]
        if extra:
            self._extend_tables(extra)
        fill(fields, size, decoding, chunks)
        output = graphs.run(size, flat)
        ending = [chunk for chunk in chunks if chunk.sample]
        self._answer(step, [*decoding, *ending], chunks, output)
        for chunk in ending:
            self._rows[chunk.row].has_last_token = True

    def _pack(self, segments: list[Segment], packed: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
        """Fill the columns of rows that decode; returns block table entries that have no place: (flat index, block).

        packed: [5, at least one per segment], see `triton_step`; padding so far.
        """
        num_rows = len(segments)
        packed[triton_step.ROW, :num_rows] = [segment.row for segment in segments]
        packed[triton_step.LENGTH, :num_rows] = [segment.position + 1 for segment in segments]
        packed[triton_step.OUTPUT_INDEX, :num_rows] = [segment.output_index for segment in segments]
        extra: list[tuple[int, int]] = []
        for index, segment in enumerate(segments):
            new = segment.new_block_ids
            if not new:
                continue
            table = self._rows[segment.row].block_ids
            if len(new) == 1 and len(table) < self._columns:
                packed[triton_step.NEW_COLUMN, index] = len(table)
                packed[triton_step.NEW_BLOCK, index] = new[0]
                table += new
            else:
                extra += self._extend(segment)
        return extra

    def _run_eagerly(self, segments: list[Segment], step: DeviceStep) -> None:
        """Prefill, alone or mixed with decode."""
        entries = [entry for segment in segments for entry in self._extend(segment)]
        if entries:
            self._extend_tables(entries)
        spans = [Span(s.num_tokens, s.position + s.num_tokens, self._rows[s.row].block_ids) for s in segments]
        decoder = self._decoder
        plan = decoder.kernels.plan_batch(spans, self._windows, self._shape, decoder.dtype, decoder.device)
        sampled = [segment for segment in segments if segment.sample]
        chunks = [segment for segment in segments if not segment.decodes]
        token_ids, positions, places, place_rows, ends, rows, output_indices, chunk_places, chunk_lengths = upload(
            step_arrays(segments), decoder.device
        )
        if places.numel():
            last = self._sampler.row_state[:, 0].index_select(0, place_rows)
            token_ids.index_copy_(0, places, last.to(torch.int64))
        on_stored = None if self._marks is None else self._marks.stored
        hidden = decoder.forward(token_ids, positions, plan, self._storage.kv, on_stored)
        answers = torch.empty(len(sampled) + len(chunks), dtype=torch.int32, device=decoder.device)
        output = StepOutput(answers, decoder.head(hidden.index_select(0, ends)) if sampled else hidden[:0])
        if sampled:
            self._sampler.draw(output.logits, rows, output_indices, output.token_ids)
        if chunks:
            triton_step.judge_chunks(hidden, chunk_places, chunk_lengths, output.are_bad)
        self._answer(step, sampled, chunks, output)
        for segment in sampled:
            self._rows[segment.row].has_last_token = True

    def _answer(self, step: DeviceStep, sampled: list[Segment], chunks: list[Segment], output: StepOutput) -> None:
        """Let special rows choose again, then send tokens and verdicts on their way."""
        special = None
        indices = [
            i for i, segment in enumerate(sampled) if self._sampler.is_special(segment.row, segment.output_index)
        ]
        if indices:
            rows = [sampled[index].row for index in indices]
            output_indices = [sampled[index].output_index for index in indices]
            special = self._sampler.redraw(indices, rows, output_indices, output.logits, output.token_ids)
        answers = output.answers.to("cpu", non_blocking=True, copy=True)
        step.answer(sampled, chunks, answers[: output.num_samples], answers[output.num_samples :], special)

    def _extend(self, segment: Segment) -> list[tuple[int, int]]:
        """Append the segment's new blocks to its row's table; returns what the device's table must learn."""
        table = self._rows[segment.row].block_ids
        first = segment.row * self._columns + len(table)
        # A front may reserve more blocks than the context can fill; those are never read.
        fitting = segment.new_block_ids[: max(0, self._columns - len(table))]
        table += segment.new_block_ids
        return [(first + number, block) for number, block in enumerate(fitting)]

    def _extend_tables(self, entries: Sequence[tuple[int, int]]) -> None:
        """entries: (flat index, block)."""
        places = np.array([place for place, _ in entries], dtype=np.int64)
        blocks = np.array([block for _, block in entries], dtype=np.int32)
        at, values = upload([places, blocks], self._decoder.device)
        self._row_tables.view(-1).index_copy_(0, at, values)


def step_arrays(segments: list[Segment]) -> list[npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
    """Token ids and positions; place and row of each last token; place, row and output index of each sampled one; place
    and number of tokens of each chunk."""
    token_ids: list[npt.NDArray[np.int64]] = []
    positions: list[npt.NDArray[np.int64]] = []
    lasts: list[tuple[int, int]] = []
    samples: list[tuple[int, int, int]] = []
    chunks: list[tuple[int, int]] = []
    start = 0
    for segment in segments:
        if segment.token_ids is None:
            lasts.append((start, segment.row))
        if not segment.decodes:
            chunks.append((start, segment.num_tokens))
        given = segment.token_ids or bytes(TOKEN_BYTES)
        token_ids.append(np.frombuffer(given, dtype=np.uint32).astype(np.int64))
        positions.append(np.arange(segment.position, segment.position + segment.num_tokens))
        start += segment.num_tokens
        if segment.sample:
            samples.append((start - 1, segment.row, segment.output_index))
    sampled = np.array(samples, dtype=np.int64).reshape(-1, 3)
    last = np.array(lasts, dtype=np.int64).reshape(-1, 2)
    chunk = np.array(chunks, dtype=np.int32).reshape(-1, 2)
    return [
        np.concatenate(token_ids),
        np.concatenate(positions),
        last[:, 0],
        last[:, 1],
        sampled[:, 0],
        sampled[:, 1].astype(np.int32),
        sampled[:, 2].astype(np.int32),
        chunk[:, 0],
        chunk[:, 1],
    ]
