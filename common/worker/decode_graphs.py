"""Decode steps as captured CUDA graphs, one per batch size, from the packed plan to the sampled tokens.

A batch is padded to the next captured size; padding has context length 0 and the spare row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from common.kernels import triton_step
from common.kernels.cuda_backend import TritonPlan, plan_decode, refresh_decode
from common.kvcache.storage import KVStorage
from common.models.decoder import Decoder
from common.sampling.device_sampler import DeviceSampler
from common.worker.graph_capture import GraphCapture

_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_STEP_BEYOND: Final = 64


def batch_sizes(max_rows: int) -> tuple[int, ...]:
    """The sizes to capture so that any batch of up to `max_rows` fits; padding stays below a half, mostly far below."""
    beyond = range(_SIZES[-1] + _STEP_BEYOND, max_rows + _STEP_BEYOND, _STEP_BEYOND)
    smaller = [size for size in (*_SIZES, *beyond) if size < max_rows]
    return (*smaller, max_rows)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Of a captured step: overwritten by the next one of the same size."""

    answers: torch.Tensor  # [n + chunks] int32: drawn tokens, then of each chunk of a prompt whether it is bad
    logits: torch.Tensor  # [n, vocab]

    @property
    def num_samples(self) -> int:
        return self.logits.shape[0]

    @property
    def token_ids(self) -> torch.Tensor:
        """[n] int32, a view."""
        return self.answers[: self.num_samples]

    @property
    def are_bad(self) -> torch.Tensor:
        """[chunks] int32, a view."""
        return self.answers[self.num_samples :]


class DecodeGraphs:
    """The captured steps. Tensors that they read and write are shared by all sizes, as steps follow each other."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        sampler: DeviceSampler,
        row_tables: torch.Tensor,
        sizes: tuple[int, ...],
        capture: GraphCapture,
    ) -> None:
        """row_tables: [rows + 1, columns] int32, the rows' block tables; the last row is for padding."""
        self._decoder = decoder
        self._storage = storage
        self._sampler = sampler
        self._row_tables = row_tables
        self._sizes = sizes
        device = decoder.device
        self._token_ids = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        self._packed: dict[int, torch.Tensor] = {}
        self._steps: dict[int, _Step] = {}  # graphs hold the addresses of their tensors, not references
        self._replay: dict[int, Callable[[], StepOutput]] = {}
        self._capture_all(capture)

    @property
    def max_size(self) -> int:
        return self._sizes[-1]

    def size_for(self, num_rows: int) -> int:
        """The smallest captured size that holds the batch."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def packed(self, size: int) -> torch.Tensor:
        """The input of `run(size)`, to be overwritten before it: see `triton_step`. [5, size] int32."""
        return self._packed[size]

    def run(self, size: int) -> StepOutput:
        """Enqueue a step on the current stream."""
        return self._replay[size]()

    def _capture_all(self, capture: GraphCapture) -> None:
        device = self._decoder.device
        for size in reversed(self._sizes):
            packed = torch.full((triton_step.NUM_FIELDS, size), -1, dtype=torch.int32, device=device)
            packed[triton_step.ROW] = self._row_tables.shape[0] - 1
            packed[triton_step.LENGTH] = 0
            packed[triton_step.OUTPUT_INDEX] = 0
            self._packed[size] = packed
            plan = plan_decode(
                size,
                self._row_tables.shape[1],
                set(self._decoder.config.windows),
                self._storage.shape,
                self._decoder.dtype,
                device,
            )
            step = _Step(self, packed, plan, torch.full((size,), -1, dtype=torch.int32, device=device))
            self._steps[size] = step
            self._replay[size] = capture.capture(step.run)

    @torch.inference_mode()
    def _step(self, packed: torch.Tensor, plan: TritonPlan, token_ids: torch.Tensor) -> StepOutput:
        decode = plan.decode
        assert decode is not None
        size = packed.shape[1]
        inputs, positions = self._token_ids[:size], self._positions[:size]
        triton_step.begin_step(
            packed,
            self._sampler.row_state,
            self._row_tables,
            self._storage.shape.block_size,
            inputs,
            positions,
            decode.context_lengths,
            decode.block_tables,
        )
        refresh_decode(plan)
        hidden = self._decoder.forward(inputs, positions, plan, self._storage.kv)
        logits = self._decoder.head(hidden)
        self._sampler.draw(logits, packed[triton_step.ROW], packed[triton_step.OUTPUT_INDEX], token_ids)
        return StepOutput(token_ids, logits)


@dataclass(frozen=True, slots=True)
class _Step:
    """A decode step of one size with the tensors that are its own."""

    graphs: DecodeGraphs
    packed: torch.Tensor
    plan: TritonPlan
    token_ids: torch.Tensor

    def run(self) -> StepOutput:
        return self.graphs._step(self.packed, self.plan, self.token_ids)
