"""Logits to tokens for a running batch: which token each row draws depends on that row alone, never on its
neighbours.

Order: logit bias, repetition penalty (prompt and generated tokens), frequency and presence penalty
(generated tokens), `min_tokens`, then greedy argmax (lowest id wins a tie) or temperature, top-k, top-p,
min-p and a draw whose random number is a function of (seed, choice, position). Reported logprobs are the
log-softmax of the raw logits, before all of these. This module knows nothing of requests, stop conditions
or text.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from common.errors import InternalError
from common.sampling import philox
from common.sampling.cutoff import keep_likeliest
from common.sampling.draw import draw, padded_size
from common.sampling.limits import MAX_LOGPROBS
from common.sampling.params import SamplingParams
from common.sampling.penalties import PenaltyTable

TokenLogprobs: TypeAlias = tuple[float, list[tuple[int, float]]]
Indices: TypeAlias = npt.NDArray[np.int64]

_VECTORISE_FROM: Final = 64  # rows from which the vectorised Philox beats the scalar one


class _Needs(enum.IntFlag):
    """What a row needs beyond an argmax over the raw logits."""

    PENALTIES = 1
    BIAS = 2
    MIN_TOKENS = 4
    DRAW = 8
    LOGPROBS = 16


_ADJUST: Final = int(_Needs.PENALTIES | _Needs.BIAS | _Needs.MIN_TOKENS)


@dataclass(frozen=True, slots=True)
class _Row:
    """What a row's sequence asks for; its tensors are on the sampler's device."""

    params: SamplingParams
    needs: int
    bias_ids: torch.Tensor  # [entries] int64
    bias: torch.Tensor  # [entries] float32
    ending_ids: torch.Tensor  # [entries] int64


@dataclass(frozen=True, slots=True)
class _RawLogprobs:
    """Log-probabilities of those rows of a batch that asked for them."""

    indices: list[int]  # into the batch
    num_top: list[int]
    chosen: torch.Tensor  # [n] float32
    top: torch.Tensor  # [n, MAX_LOGPROBS or vocab] float32, most likely first
    top_ids: torch.Tensor  # int64, of the same shape


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """One token per row. Only `invalid` and `logprobs` read back from the device and so wait for it."""

    token_ids: torch.Tensor  # [B] int64; 0 where the row has an error, so that it stays a valid index
    valid: torch.Tensor  # [B] bool
    raw_logprobs: _RawLogprobs | None

    @property
    def invalid(self) -> frozenset[int]:
        """Batch indices of rows that have no token: their logits hold NaN or infinity, or every token is excluded. The
        others are sound."""
        if bool(self.valid.all()):
            return frozenset()
        return frozenset(index for index, ok in enumerate(self.valid.tolist()) if not ok)

    @property
    def logprobs(self) -> list[TokenLogprobs | None]:
        """Per row (the chosen token's logprob, [(token id, logprob), most likely first]), or None."""
        result: list[TokenLogprobs | None] = [None] * self.token_ids.shape[0]
        raw = self.raw_logprobs
        if raw is None:
            return result
        columns = (raw.indices, raw.num_top, raw.chosen.tolist(), raw.top.tolist(), raw.top_ids.tolist())
        for index, num_top, chosen, top, top_ids in zip(*columns, strict=True):
            ranked = sorted(zip(top_ids, top, strict=True), key=lambda pair: (-pair[1], pair[0]))
            result[index] = (chosen, ranked[:num_top])
        return result


class BatchSampler:
    """Sampling state of the rows of a batch. Rows are slots that the caller hands out, 0 ≤ row < max_rows."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device | str = "cpu") -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._rows: list[_Row | None] = [None] * max_rows
        self._needs = np.zeros(max_rows, dtype=np.int64)
        self._penalties = PenaltyTable(vocab_size, max_rows, self._device)
        self._work = torch.zeros((0, padded_size(vocab_size)), dtype=torch.float32, device=self._device)

    def add(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Take `row` for a sequence that has generated `output_token_ids` so far, here or elsewhere."""
        if self._rows[row] is not None:
            raise InternalError(f"sampling row {row} is taken")
        bias = [value for _, value in params.logit_bias]
        self._rows[row] = _Row(
            params=params,
            needs=_needs(params),
            bias_ids=self._ids([token_id for token_id, _ in params.logit_bias]),
            bias=torch.tensor(bias, dtype=torch.float32, device=self._device),
            ending_ids=self._ids(params.ending_token_ids),
        )
        self._needs[row] = _needs(params)
        if params.has_penalties:
            self._penalties.add(row, params, prompt_token_ids, output_token_ids)

    def remove(self, row: int) -> None:
        """Give `row` back."""
        if self._rows[row] is None:
            raise InternalError(f"sampling row {row} is not taken")
        self._rows[row] = None
        self._needs[row] = 0

    def sample(self, rows: Sequence[int], logits: torch.Tensor, positions: Sequence[int]) -> SampleOutput:
        """Choose one token for each of the (distinct) rows and count it towards the row's penalties.

        logits: [B, vocab] float32 on the sampler's device, left as they are. positions: the index of each
        token in its sequence's output, 0 = the first. Row i's answer depends on row i alone.
        """
        if logits.shape != (len(rows), self._vocab_size) or len(positions) != len(rows):
            raise InternalError(
                f"logits {tuple(logits.shape)} and {len(positions)} positions for {len(rows)} rows "
                f"of a vocabulary of {self._vocab_size}"
            )
        logits = logits.detach().float()
        row_ids = np.asarray(rows, dtype=np.int64)
        needs = self._needs[row_ids]
        token_ids, valid = _argmax(logits)
        special = np.flatnonzero(needs & (_ADJUST | _Needs.DRAW))
        if special.size:
            at = self._ids(special)
            rows_positions = [positions[index] for index in special.tolist()]
            chosen, can_choose = self._choose(row_ids[special], logits, at, rows_positions)
            token_ids[at] = chosen
            valid[at] &= can_choose
        token_ids = torch.where(valid, token_ids, 0)
        penalised = np.flatnonzero(needs & _Needs.PENALTIES)
        if penalised.size:
            self._penalties.count(self._ids(row_ids[penalised]), token_ids[self._ids(penalised)])
        with_logprobs = np.flatnonzero(needs & _Needs.LOGPROBS)
        raw = self._raw_logprobs(with_logprobs, row_ids, logits, token_ids) if with_logprobs.size else None
        return SampleOutput(token_ids, valid, raw)

    def _choose(
        self, row_ids: Indices, logits: torch.Tensor, at: torch.Tensor, positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The slow path, for rows `at` ([n] int64) of the batch's logits. Returns tokens [n] and their validity."""
        rows = [self._row(row) for row in row_ids]
        padded = self._workspace(len(rows))
        own_logits = padded[:, : self._vocab_size]
        torch.index_select(logits, 0, at, out=own_logits)
        self._adjust(rows, row_ids, own_logits, positions)
        token_ids, valid = _argmax(own_logits)
        drawing = torch.tensor([bool(row.needs & _Needs.DRAW) for row in rows])
        if drawing.any():
            drawn = self._draw([row.params for row in rows], padded, positions)
            token_ids = torch.where(drawing.to(self._device, non_blocking=True), drawn, token_ids)
        return token_ids, valid

    def _adjust(self, rows: list[_Row], row_ids: Indices, logits: torch.Tensor, positions: Sequence[int]) -> None:
        """Apply bias, penalties and min_tokens. logits: [n, vocab] float32, changed in place."""
        for index, row in enumerate(rows):
            if row.needs & _Needs.BIAS:
                logits[index].index_add_(0, row.bias_ids, row.bias)
        penalised = [index for index, row in enumerate(rows) if row.needs & _Needs.PENALTIES]
        if penalised:
            at = self._ids(penalised)
            logits[at] = self._penalties.apply(row_ids[penalised], logits[at])
        for index, row in enumerate(rows):
            if row.needs & _Needs.MIN_TOKENS and positions[index] < row.params.min_tokens:
                logits[index].index_fill_(0, row.ending_ids, float("-inf"))

    def _draw(self, params: list[SamplingParams], padded: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Draw for every row; what a greedy one draws is for the caller to ignore.

        padded: [n, padded vocab] float32, adjusted logits, overwritten by weights. Returns [n] int64.
        """
        weights = padded[:, : self._vocab_size]
        divisors = [[1.0 if p.is_greedy else p.temperature] for p in params]
        temperature = torch.tensor(divisors, dtype=torch.float32)
        weights.sub_(weights.amax(dim=-1, keepdim=True))  # the largest weight of each row is then exactly 1
        weights.div_(temperature.to(self._device, non_blocking=True)).exp_()
        cut = [index for index, p in enumerate(params) if _has_cutoff(p)]
        if cut:
            top_k = [params[index].top_k for index in cut]
            top_p = [params[index].top_p for index in cut]
            keep_likeliest(weights, cut, top_k, top_p, [params[index].min_p for index in cut])
        return draw(padded, _uniforms(params, positions).to(self._device, non_blocking=True))

    def _workspace(self, num_rows: int) -> torch.Tensor:
        """[num_rows, padded vocab] float32, kept between steps because fresh memory costs more than the arithmetic.

        Only the columns of the vocabulary are ever written, so the padding stays 0.
        """
        if self._work.shape[0] < num_rows:
            shape = (num_rows, padded_size(self._vocab_size))
            self._work = torch.zeros(shape, dtype=torch.float32, device=self._device)
        return self._work[:num_rows]

    def _raw_logprobs(
        self, indices: Indices, row_ids: Indices, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> _RawLogprobs:
        at = self._ids(indices)
        logprobs = logits[at].log_softmax(dim=-1)
        chosen = logprobs.gather(1, token_ids[at].view(-1, 1)).view(-1)
        # Always the same k: which of several equal tokens topk returns must not depend on the batch.
        top, top_ids = logprobs.topk(min(MAX_LOGPROBS, self._vocab_size), dim=-1)
        num_top = [self._row(row).params.logprobs or 0 for row in row_ids[indices]]
        return _RawLogprobs(indices.tolist(), num_top, chosen, top, top_ids)

    def _row(self, row: int) -> _Row:
        state = self._rows[row]
        assert state is not None
        return state

    def _ids(self, ids: Sequence[int] | Indices) -> torch.Tensor:
        """[n] int64 on the device."""
        return torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(self._device, non_blocking=True)


def _needs(params: SamplingParams) -> int:
    needs = _Needs(0)
    if params.has_penalties:
        needs |= _Needs.PENALTIES
    if params.logit_bias:
        needs |= _Needs.BIAS
    if params.min_tokens and params.ending_token_ids:
        needs |= _Needs.MIN_TOKENS
    if not params.is_greedy:
        needs |= _Needs.DRAW
    if params.logprobs is not None:
        needs |= _Needs.LOGPROBS
    return int(needs)


def _has_cutoff(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [n, vocab]. Returns the lowest id of the largest logit, [n] int64, and whether it is finite.

    A NaN counts as the largest, so one that is not finite means a row with NaN, with +inf, or with -inf only.
    """
    if logits.device.type == "cpu":  # numpy's argmax is vectorised, torch's is ten times slower
        token_ids = torch.from_numpy(logits.numpy().argmax(axis=-1))
    else:
        token_ids = logits.argmax(dim=-1)
    return token_ids, logits.gather(1, token_ids.view(-1, 1)).view(-1).isfinite()


def _uniforms(params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """One draw per row, [n] float64 in host memory: the host knows all of its inputs."""
    if len(params) < _VECTORISE_FROM:
        draws = [philox.uniform(p.seed, p.choice, at) for p, at in zip(params, positions, strict=True)]
        return torch.tensor(draws, dtype=torch.float64)
    seeds = torch.tensor([philox.as_signed(p.seed) for p in params])
    return philox.uniforms(seeds, torch.tensor([p.choice for p in params]), torch.tensor(positions))
