"""What penalties must remember of each row: how often each token was generated, and which ones the prompt
holds.

Dense tables on the logits' device, allocated when the first row needs them, so that applying and counting
are a few vectorised operations without synchronisation. This module knows nothing of seeds, draws or
requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.sampling.params import SamplingParams


class PenaltyTable:
    """Token counts of `max_rows` rows: 5 bytes x vocabulary x rows, from the first row with penalties on."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._generated = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [max_rows, vocab]
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # [max_rows, vocab]
        self._factors = torch.zeros((0, 3), dtype=torch.float32, device=device)  # [max_rows, 3]

    def add(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
    ) -> None:
        """Start `row` over, with the tokens that its sequence already has."""
        if self._generated.shape[0] == 0:
            shape = (self._max_rows, self._vocab_size)
            self._generated = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._factors = torch.zeros((self._max_rows, 3), dtype=torch.float32, device=self._device)
        generated = torch.tensor(output_token_ids, dtype=torch.int64)
        counts = torch.bincount(generated, minlength=self._vocab_size).to(torch.int32)
        self._generated[row] = counts.to(self._device)
        in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool)
        in_prompt[torch.tensor(prompt_token_ids, dtype=torch.int64)] = True
        self._in_prompt[row] = in_prompt.to(self._device)
        factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._factors[row] = torch.tensor(factors, dtype=torch.float32).to(self._device)

    def apply(self, rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """rows: [n] int64 on the device. logits: [n, vocab] float32. Returns new logits of the same shape."""
        generated = self._generated[rows]
        was_generated = generated > 0
        repetition, frequency, presence = self._factors[rows].unsqueeze(-1).unbind(1)  # each [n, 1]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(was_generated | self._in_prompt[rows], repeated, logits)
        return logits - generated * frequency - was_generated * presence

    def count(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Record one generated token per row. rows, token_ids: [n] int64 on the device; rows are distinct."""
        self._generated[rows, token_ids] += 1
