"""Steps with chunks of prompts, alone or beside decoding rows, as captured CUDA graphs: one per number of each.

Whatever differs between steps of one size is in one array (`mixed_step`) that goes up before the replay. Both numbers
are padded to the next captured ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from common.kernels import triton_step
from common.kernels.cuda_backend import TritonPlan, plan_mixed, refresh_decode, tile_queries
from common.kernels.upload import overwrite
from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder
from common.sampling.device_sampler import DeviceSampler
from common.worker.decode_graphs import StepOutput
from common.worker.graph_capture import GraphCapture
from common.worker.mixed_step import MAX_CHUNKS, MixedFields, MixedSize, blank, cut
from common.worker.step_plan import Segment

_ROWS: Final = (8, 16, 32, 48, 64, 96, 128, 192, 256)
_ROWS_BEYOND: Final = 128
_MIN_TOKENS: Final = 64


def row_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of decoding rows to capture: none, and so that up to `max_rows` fit."""
    beyond = range(_ROWS[-1] + _ROWS_BEYOND, max_rows, _ROWS_BEYOND)
    return (0, *(size for size in (*_ROWS, *beyond) if size < max_rows), max_rows)


def chunk_sizes(chunk_tokens: int) -> tuple[int, ...]:
    """Numbers of prompt tokens to capture, so that up to `chunk_tokens` >= 1 fit: halves, multiples of 64."""
    sizes = [-(-chunk_tokens // _MIN_TOKENS) * _MIN_TOKENS]
    while sizes[-1] > _MIN_TOKENS:
        sizes.append(-(-sizes[-1] // 2 // _MIN_TOKENS) * _MIN_TOKENS)
    return tuple(reversed(sizes))


def prompt_sizes(prompt_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens to capture where no row decodes, so that up to `prompt_tokens` >= 1 fit: multiples of 64."""
    return tuple(range(_MIN_TOKENS, prompt_tokens + _MIN_TOKENS, _MIN_TOKENS))


class MixedGraphs:
    """The captured steps. Tensors that they fill are shared by all sizes, as steps follow each other."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        sampler: DeviceSampler,
        row_tables: torch.Tensor,
        rows: tuple[int, ...],
        tokens: tuple[int, ...],
        capture: GraphCapture,
    ) -> None:
        """row_tables: [rows + 1, columns] int32, the last for padding; rows, tokens: sizes to capture, ascending."""
        self._decoder = decoder
        self._storage = storage
        self._sampler = sampler
        self._row_tables = row_tables
        self._spare_row = row_tables.shape[0] - 1
        self._rows, self._tokens = rows, tokens
        self._queries = tile_queries(len(decoder.shard.heads), storage.kv[0])
        columns, device = row_tables.shape[1], decoder.device
        self._block_tables = torch.zeros((rows[-1], columns), dtype=torch.int32, device=device)
        self._chunk_tables = torch.zeros((MAX_CHUNKS, columns), dtype=torch.int32, device=device)
        self._token_ids, self._positions = torch.zeros((2, rows[-1] + tokens[-1]), dtype=torch.int64, device=device)
        self._steps: dict[MixedSize, _Step] = {}  # graphs hold the addresses of their tensors, not references
        self._replay: dict[MixedSize, Callable[[], StepOutput]] = {}
        for num_tokens in reversed(tokens):
            for num_rows in reversed(rows):
                size = MixedSize(num_rows, num_tokens, self._queries)
                self._steps[size] = self._new_step(size)
                self._replay[size] = capture.capture(self._steps[size].run)

    def size_for(self, decoding: Sequence[Segment], chunks: Sequence[Segment]) -> MixedSize | None:
        """The smallest captured size that holds the step, if one does."""
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        fits = len(decoding) <= self._rows[-1] and num_tokens <= self._tokens[-1] and 0 < len(chunks) <= MAX_CHUNKS
        if not fits or any(chunk.token_ids is None for chunk in chunks):
            return None
        num_rows = self._rows[bisect_left(self._rows, len(decoding))]
        return MixedSize(num_rows, self._tokens[bisect_left(self._tokens, num_tokens)], self._queries)

    def blank(self, size: MixedSize) -> tuple[npt.NDArray[np.int32], MixedFields[npt.NDArray[np.int32]]]:
        """A step of padding, to be filled for `run`."""
        return blank(size, self._spare_row)

    def run(self, size: MixedSize, flat: npt.NDArray[np.int32]) -> StepOutput:
        """Enqueue a step on the current stream; its samples come in the order in which `fill` lists them."""
        overwrite(self._steps[size].flat, flat)
        return self._replay[size]()

    def _new_step(self, size: MixedSize) -> _Step:
        device = self._decoder.device
        flat = torch.from_numpy(self.blank(size)[0]).to(device)
        fields = cut(flat, size)
        plan = plan_mixed(
            self._block_tables[: size.num_rows],
            self._chunk_tables,
            fields.tiles,
            size.queries,
            size.num_tokens,
            set(self._decoder.config.windows),
            self._storage.shape,
            self._decoder.dtype,
        )
        answers = torch.full((size.num_samples + MAX_CHUNKS,), -1, dtype=torch.int32, device=device)
        return _Step(self, size, flat, fields, plan, answers)

    @torch.inference_mode()
    def _step(self, step: _Step) -> StepOutput:
        fields, decode, num_rows = step.fields, step.plan.decode, step.size.num_rows
        num_tokens = num_rows + step.size.num_tokens
        token_ids, positions = self._token_ids[:num_tokens], self._positions[:num_tokens]
        if decode is not None:
            triton_step.begin_step(
                fields.decode,
                self._sampler.row_state,
                self._row_tables,
                self._storage.shape.block_size,
                token_ids[:num_rows],
                positions[:num_rows],
                decode.context_lengths,
                decode.block_tables,
            )
            refresh_decode(step.plan)
        triton_step.begin_chunks(
            fields.chunks,
            fields.token_ids,
            self._row_tables,
            self._storage.shape.block_size,
            token_ids[num_rows:],
            positions[num_rows:],
            step.plan.store_slots[num_rows:],
            self._chunk_tables,
        )
        hidden = self._decoder.forward(token_ids, positions, step.plan, self._storage.kv)
        output = StepOutput(step.answers, self._decoder.head(hidden.index_select(0, fields.places)))
        self._sampler.draw(output.logits, fields.rows, fields.output_indices, output.token_ids)
        triton_step.judge_chunks(
            hidden[num_rows:],
            fields.chunks[triton_step.CHUNK_PLACE],
            fields.chunks[triton_step.CHUNK_LENGTH],
            output.are_bad,
        )
        return output


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of one size with the tensors that are its own."""

    graphs: MixedGraphs
    size: MixedSize
    flat: torch.Tensor
    fields: MixedFields[torch.Tensor]
    plan: TritonPlan
    answers: torch.Tensor

    def run(self) -> StepOutput:
        return self.graphs._step(self)
