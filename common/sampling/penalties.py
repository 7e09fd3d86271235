"""What penalties must remember of each row: how often each token was generated, and which ones the prompt
holds.

Dense tables on the logits' device, allocated when the first row needs them, so that applying and counting
are a few vectorised operations without synchronisation. This module knows nothing of seeds, draws or
requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.sampling.params import SamplingParams


class PenaltyTable:
    """Token counts of `max_rows` rows: 5 bytes x vocabulary x rows, from the first row with penalties on."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._repetition_rows = np.zeros(max_rows, dtype=np.bool_)
        self._allocate(0)

    def add(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
    ) -> None:
        """Start `row` over, with the tokens that its sequence already has."""
        if self._generated.shape[0] == 0:
            self._allocate(self._max_rows)
        generated = torch.bincount(torch.tensor(output_token_ids, dtype=torch.int64), minlength=self._vocab_size)
        self._generated[row] = generated.to(torch.float32).to(self._device)
        in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool)
        in_prompt[torch.tensor(prompt_token_ids, dtype=torch.int64)] = True
        self._in_prompt[row] = in_prompt.to(self._device)
        factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._factors[row] = torch.tensor(factors, dtype=torch.float32).to(self._device)
        self._repetition_rows[row] = params.repetition_penalty != 1.0

    def apply(self, rows: npt.NDArray[np.int64], logits: torch.Tensor) -> torch.Tensor:
        """rows: [n] in host memory. logits: [n, vocab] float32. Returns new logits of the same shape.

        Neutral factors leave a logit's bits alone, so skipping them for a whole batch changes nothing.
        """
        at = torch.from_numpy(rows).to(self._device)
        generated = self._generated[at]  # [n, vocab]
        repetition, frequency, presence = self._factors[at].unsqueeze(-1).unbind(1)  # each [n, 1]
        if self._repetition_rows[rows].any():
            # One of the two terms is 0, so this is a division of positive and a product of negative logits.
            repeated = logits.clamp(min=0).div_(repetition) + logits.clamp(max=0).mul_(repetition)
            logits = torch.where((generated > 0) | self._in_prompt[at], repeated, logits)
        logits = torch.addcmul(logits, generated, frequency, value=-1)
        return logits.addcmul_(generated.clamp_(max=1), presence, value=-1)

    def count(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Record one generated token per row. rows, token_ids: [n] int64 on the device; rows are distinct."""
        self._generated[rows, token_ids] += 1

    def _allocate(self, num_rows: int) -> None:
        shape = (num_rows, self._vocab_size)
        # Counts are float32, exact up to 2**24, because they only ever enter products with logits.
        self._generated = torch.zeros(shape, dtype=torch.float32, device=self._device)
        self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._factors = torch.zeros((num_rows, 3), dtype=torch.float32, device=self._device)
