"""Sampling without waiting for the device: rows' parameters lie on it, and one kernel turns logits into tokens.

Rows that need more (penalties, logit bias, `min_tokens`, logprobs) are handed to `BatchSampler` after the kernel.
Knows nothing of requests or steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.kernels.triton_sampling import INVALID_TOKEN, NUM_STATE_FIELDS, draw_tokens
from common.kernels.upload import upload
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler, SampleOutput

_MAX_INT32 = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class SpecialRows:
    """What `BatchSampler` chose for some members of a batch; its tensors are on their way to host memory."""

    indices: list[int]
    output: SampleOutput


class DeviceSampler:
    """Sampling state of `max_rows` rows and one more, the last, which padding uses."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._special = BatchSampler(vocab_size, max_rows, device)
        self._params: list[SamplingParams | None] = [None] * max_rows
        self.row_state = torch.zeros((max_rows + 1, NUM_STATE_FIELDS), dtype=torch.int32, device=device)

    def add(
        self, row: int, params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]
    ) -> npt.NDArray[np.int32]:
        """Take `row`. Returns what `row_state[row]` must become before the row's first step."""
        self._special.add(row, params, prompt_token_ids, output_token_ids)
        self._params[row] = params
        return row_fields(params, output_token_ids[-1] if output_token_ids else 0)

    def remove(self, row: int) -> None:
        """Give `row` back."""
        self._special.remove(row)
        self._params[row] = None

    def draw(
        self, logits: torch.Tensor, rows: torch.Tensor, output_indices: torch.Tensor, token_ids: torch.Tensor
    ) -> None:
        """Choose a token for every row, special ones by temperature and cutoffs alone. Shapes: see `draw_tokens`."""
        draw_tokens(logits, self._vocab_size, rows, output_indices, self.row_state, token_ids)

    def is_special(self, row: int, output_index: int) -> bool:
        """Whether `redraw` must choose the row's token."""
        params = self._params[row]
        assert params is not None
        return (
            params.has_penalties
            or bool(params.logit_bias)
            or params.logprobs is not None
            or (output_index < params.min_tokens and bool(params.ending_token_ids))
        )

    def redraw(
        self,
        indices: list[int],
        rows: list[int],
        output_indices: list[int],
        logits: torch.Tensor,
        token_ids: torch.Tensor,
    ) -> SpecialRows:
        """Choose the tokens of special rows anew. `indices`: their places in the batch of logits and token_ids."""
        at, own_rows = upload([np.array(indices), np.array(rows)], logits.device)
        own_logits = logits.index_select(0, at)[:, : self._vocab_size].float()
        output = self._special.sample(rows, own_logits, output_indices)
        chosen = output.token_ids.to(torch.int32)
        token_ids.index_copy_(0, at, torch.where(output.valid, chosen, INVALID_TOKEN))
        self.row_state[:, 0].index_copy_(0, own_rows, chosen)
        return SpecialRows(indices, _to_host(output))


def row_fields(params: SamplingParams, last_token_id: int) -> npt.NDArray[np.int32]:
    """A row of `row_state`: see `triton_sampling`."""
    fields = np.zeros(NUM_STATE_FIELDS, dtype=np.int32)
    floats = fields.view(np.float32)
    fields[0] = last_token_id
    floats[1] = 0.0 if params.is_greedy else params.temperature
    fields[2] = min(params.top_k, _MAX_INT32)
    floats[3] = params.top_p
    floats[4] = params.min_p
    fields[5:7] = np.array([params.seed], dtype=np.uint64).view(np.int32)  # low word first
    fields[7] = params.choice
    return fields


def _to_host(output: SampleOutput) -> SampleOutput:
    """A copy in host memory; complete once the device has passed this point."""
    raw = output.raw_logprobs
    if raw is not None:
        raw = dataclasses.replace(raw, chosen=_host(raw.chosen), top=_host(raw.top), top_ids=_host(raw.top_ids))
    return SampleOutput(_host(output.token_ids), _host(output.valid), raw)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", non_blocking=True)
