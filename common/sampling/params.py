"""How the tokens of one sequence are chosen: the value that travels from the router to the ranks.

`validate` is called once, at the router's edge; everybody behind it trusts the value. Text (stop strings)
is not here: only the router knows text. This module knows nothing of torch, logits or sockets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import InvalidArgument
from common.sampling import limits


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One sequence's sampling. `seed` and `choice` name its stream of random numbers (see `philox`)."""

    max_tokens: int
    seed: int  # uint64
    choice: int = 0  # index among the sequences of one request
    min_tokens: int = 0  # no token that ends the sequence before this many were generated
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None = off, 0 = the chosen token only, k = and the k most likely
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < limits.GREEDY_BELOW_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether sampling depends on the tokens generated so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """The tokens that end the sequence: stop tokens, and EOS unless it is ignored."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids + self.eos_token_ids


def validate(params: SamplingParams, vocab_size: int, max_tokens: int = limits.MAX_TOKENS) -> None:
    """Raise `InvalidArgument` for the first field that is out of bounds; token ids are < `vocab_size`."""
    p = params
    _int_within("max_tokens", p.max_tokens, 1, max_tokens)
    _int_within("min_tokens", p.min_tokens, 0, p.max_tokens)
    _int_within("seed", p.seed, 0, limits.MAX_SEED)
    _int_within("choice", p.choice, 0, limits.MAX_CHOICES - 1)
    _within("temperature", p.temperature, 0.0, limits.MAX_TEMPERATURE)
    _within("top_p", p.top_p, 0.0, 1.0)
    if p.top_p == 0.0:
        raise InvalidArgument("top_p", p.top_p, "must be greater than 0 (temperature = 0 is greedy)")
    _int_within("top_k", p.top_k, 0, limits.MAX_TOP_K)
    _within("min_p", p.min_p, 0.0, 1.0)
    _within("presence_penalty", p.presence_penalty, -limits.MAX_ADDITIVE_PENALTY, limits.MAX_ADDITIVE_PENALTY)
    _within("frequency_penalty", p.frequency_penalty, -limits.MAX_ADDITIVE_PENALTY, limits.MAX_ADDITIVE_PENALTY)
    _within(
        "repetition_penalty",
        p.repetition_penalty,
        limits.MIN_REPETITION_PENALTY,
        limits.MAX_REPETITION_PENALTY,
    )
    if p.logprobs is not None:
        _int_within("logprobs", p.logprobs, 0, min(limits.MAX_LOGPROBS, vocab_size))
    _validate_logit_bias(p.logit_bias, vocab_size)
    _validate_token_ids("stop_token_ids", p.stop_token_ids, limits.MAX_STOP_TOKEN_IDS, vocab_size)
    _validate_token_ids("eos_token_ids", p.eos_token_ids, limits.MAX_EOS_TOKEN_IDS, vocab_size)


def _validate_logit_bias(logit_bias: tuple[tuple[int, float], ...], vocab_size: int) -> None:
    _validate_token_ids("logit_bias", [token for token, _ in logit_bias], limits.MAX_LOGIT_BIAS, vocab_size)
    for token_id, bias in logit_bias:
        _within(f"logit_bias[{token_id}]", bias, -limits.MAX_LOGIT_BIAS_VALUE, limits.MAX_LOGIT_BIAS_VALUE)
    if len({token_id for token_id, _ in logit_bias}) != len(logit_bias):
        raise InvalidArgument("logit_bias", logit_bias, "a token id may appear once")


def _validate_token_ids(field: str, ids: Iterable[int], max_ids: int, vocab_size: int) -> None:
    ids = tuple(ids)
    if len(ids) > max_ids:
        raise InvalidArgument(field, len(ids), f"at most {max_ids} entries")
    for token_id in ids:
        _int_within(field, token_id, 0, vocab_size - 1)


def _within(field: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgument(field, value, "must be a finite number")
    if not low <= value <= high:
        raise InvalidArgument(field, value, f"must be in [{low:g}, {high:g}]")


def _int_within(field: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(field, value, "must be an integer")
    if not low <= value <= high:
        raise InvalidArgument(field, value, f"must be in [{low}, {high}]")
