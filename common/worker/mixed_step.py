"""What goes to the device before a captured step with chunks of prompts: one array, laid out by the step's size.

    tokens of a step: | rows that decode, padded | chunks of prompts, one after the other | padding |

Padding stores nothing and is not sampled: rows have context length 0, tokens no slot; those tokens attend to the start
of the first chunk, so that all that is computed is finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from common.kernels import triton_step
from common.kernels.batch import Span
from common.kernels.triton_prefill import EMPTY_TILE, make_tiles
from common.worker.step_plan import Segment

MAX_CHUNKS: Final = 8  # of a step; more run kernel by kernel
_ALIGNMENT: Final = 4  # int32s: kernels are compiled for addresses that are multiples of 16 bytes
_Array = TypeVar("_Array", npt.NDArray[np.int32], torch.Tensor)


@dataclass(frozen=True, slots=True)
class MixedSize:
    """What is captured together. `num_samples` counts tokens that may be drawn, `queries` those of a tile."""

    num_rows: int
    num_tokens: int  # of chunks
    queries: int

    @property
    def num_samples(self) -> int:
        return self.num_rows + MAX_CHUNKS

    @property
    def num_tiles(self) -> int:
        """Of the chunks and of the padding behind them, at most."""
        return self.num_tokens // self.queries + MAX_CHUNKS + 1


@dataclass(frozen=True, slots=True)
class MixedFields(Generic[_Array]):
    """Views of the one array: in host memory to be filled, on the device to be read. All int32."""

    decode: _Array  # [5, rows], see `triton_step`
    chunks: _Array  # [4, MAX_CHUNKS], see `triton_step`
    token_ids: _Array  # [tokens] of the chunks
    tiles: _Array  # [tiles, 4], see `triton_prefill.PrefillBatch`
    places: _Array  # [samples] tokens of the step after which one is drawn
    rows: _Array  # [samples] whose sampling state is used; the spare row for padding
    output_indices: _Array  # [samples]


def shapes_of(size: MixedSize) -> list[tuple[int, ...]]:
    """Those of `MixedFields`, in order."""
    samples = (size.num_samples,)
    return [
        (triton_step.NUM_FIELDS, size.num_rows),
        (triton_step.NUM_CHUNK_FIELDS, MAX_CHUNKS),
        (size.num_tokens,),
        (size.num_tiles, 4),
        samples,
        samples,
        samples,
    ]


def num_elements(size: MixedSize) -> int:
    """Of the one array."""
    return sum(_aligned(math.prod(shape)) for shape in shapes_of(size))


def cut(flat: _Array, size: MixedSize) -> MixedFields[_Array]:
    """flat: [num_elements(size)]."""
    parts: list[Any] = []
    start = 0
    for shape in shapes_of(size):
        end = start + math.prod(shape)
        parts.append(flat[start:end].reshape(shape))
        start += _aligned(end - start)
    return MixedFields(*parts)


def blank(size: MixedSize, spare_row: int) -> tuple[npt.NDArray[np.int32], MixedFields[npt.NDArray[np.int32]]]:
    """A step of padding: the one array and its fields."""
    flat = np.zeros(num_elements(size), dtype=np.int32)
    fields = cut(flat, size)
    fields.decode[triton_step.ROW] = spare_row
    fields.decode[triton_step.NEW_COLUMN] = -1
    fields.chunks[triton_step.CHUNK_ROW] = spare_row
    fields.rows[:] = spare_row
    fields.tiles[:] = EMPTY_TILE
    return flat, fields


def fill(
    fields: MixedFields[npt.NDArray[np.int32]],
    size: MixedSize,
    decoding: Sequence[Segment],
    chunks: Sequence[Segment],
) -> None:
    """Write all but `decode`. Samples: the rows that decode, then the chunks that end their prompt."""
    samples = [(place, segment.row, segment.output_index) for place, segment in enumerate(decoding)]
    spans: list[tuple[int, Span]] = []
    start = 0
    for number, chunk in enumerate(chunks):
        count, first = chunk.num_tokens, size.num_rows + start
        fields.chunks[:, number] = (chunk.row, count, start, chunk.position)
        fields.token_ids[start : start + count] = np.frombuffer(chunk.token_ids or b"", dtype=np.int32)
        spans.append((first, Span(count, chunk.position + count, [])))
        if chunk.sample:
            samples.append((first + count - 1, chunk.row, chunk.output_index))
        start += count
    tiles = make_tiles(spans, size.queries)
    # Padding attends to the first tokens of the first chunk.
    end = size.num_rows + size.num_tokens
    tiles += [
        (0, first, 0, min(size.queries, end - first)) for first in range(size.num_rows + start, end, size.queries)
    ]
    fields.tiles[: len(tiles)] = tiles
    if samples:
        places, rows, output_indices = zip(*samples, strict=True)
        fields.places[: len(samples)] = places
        fields.rows[: len(samples)] = rows
        fields.output_indices[: len(samples)] = output_indices


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
