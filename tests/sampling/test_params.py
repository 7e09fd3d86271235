"""Sampling parameters: what passes the edge, and that the wire form is lossless."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument
from common.sampling import limits
from common.sampling.params import SamplingParams, validate

VOCAB_SIZE = 50
token_ids = st.integers(0, VOCAB_SIZE - 1)


def finite(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@st.composite
def valid_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, limits.MAX_TOKENS))
    bias = draw(st.dictionaries(token_ids, finite(-100.0, 100.0), max_size=5))
    return SamplingParams(
        max_tokens=max_tokens,
        seed=draw(st.integers(0, limits.MAX_SEED)),
        choice=draw(st.integers(0, limits.MAX_CHOICES - 1)),
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(finite(0.0, limits.MAX_TEMPERATURE)),
        top_p=draw(st.floats(0.0, 1.0, exclude_min=True)),
        top_k=draw(st.integers(0, limits.MAX_TOP_K)),
        min_p=draw(finite(0.0, 1.0)),
        presence_penalty=draw(finite(-2.0, 2.0)),
        frequency_penalty=draw(finite(-2.0, 2.0)),
        repetition_penalty=draw(finite(limits.MIN_REPETITION_PENALTY, limits.MAX_REPETITION_PENALTY)),
        logit_bias=tuple(bias.items()),
        logprobs=draw(st.none() | st.integers(0, limits.MAX_LOGPROBS)),
        stop_token_ids=tuple(draw(st.lists(token_ids, max_size=4))),
        ignore_eos=draw(st.booleans()),
        eos_token_ids=tuple(draw(st.lists(token_ids, max_size=4))),
    )


@settings(deadline=None, max_examples=100)
@given(valid_params())
def test_params_within_bounds_are_accepted_and_survive_the_wire(params: SamplingParams) -> None:
    validate(params, VOCAB_SIZE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


OUT_OF_BOUNDS: list[tuple[str, object]] = [
    ("max_tokens", 0),
    ("max_tokens", limits.MAX_TOKENS + 1),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 11),
    ("seed", -1),
    ("seed", 1 << 64),
    ("choice", -1),
    ("choice", limits.MAX_CHOICES),
    ("temperature", -0.1),
    ("temperature", 10.1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -1),
    ("top_k", 2.5),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 11.0),
    ("logprobs", -1),
    ("logprobs", limits.MAX_LOGPROBS + 1),
    ("logit_bias", ((VOCAB_SIZE, 1.0),)),
    ("logit_bias", ((-1, 1.0),)),
    ("logit_bias", ((1, 1.0), (1, 2.0))),
    ("logit_bias[1]", ((1, 101.0),)),
    ("logit_bias", tuple((i, 0.0) for i in range(limits.MAX_LOGIT_BIAS + 1))),
    ("stop_token_ids", (VOCAB_SIZE,)),
    ("stop_token_ids", (0,) * (limits.MAX_STOP_TOKEN_IDS + 1)),
    ("eos_token_ids", (-1,)),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_BOUNDS)
def test_value_out_of_bounds_is_refused_by_field(field: str, value: object) -> None:
    changes = {field.split("[")[0]: value}
    params = dataclasses.replace(SamplingParams(max_tokens=10, seed=0), **changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        validate(params, VOCAB_SIZE)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(SamplingParams) if f.type == "float"] + ["logit_bias"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_refused(field: str, value: float) -> None:
    change: object = ((1, value),) if field == "logit_bias" else value
    params = dataclasses.replace(SamplingParams(max_tokens=10, seed=0), **{field: change})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="finite"):
        validate(params, VOCAB_SIZE)


def test_callers_own_bound_on_max_tokens_is_enforced() -> None:
    with pytest.raises(InvalidArgument, match="max_tokens"):
        validate(SamplingParams(max_tokens=10, seed=0), VOCAB_SIZE, max_tokens=9)


def test_logprobs_are_bounded_by_a_small_vocabulary() -> None:
    with pytest.raises(InvalidArgument, match="logprobs"):
        validate(SamplingParams(max_tokens=10, seed=0, logprobs=6), vocab_size=5)


def test_ignored_eos_does_not_end_a_sequence() -> None:
    params = SamplingParams(max_tokens=1, seed=0, stop_token_ids=(3,), eos_token_ids=(4,))
    assert params.ending_token_ids == (3, 4)
    assert dataclasses.replace(params, ignore_eos=True).ending_token_ids == (3,)
