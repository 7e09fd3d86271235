"""Every field out of bounds is refused by name, value and limit, and no worker hears of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import grpc
import pytest
from baton.v1 import inference_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BatonError, InvalidArgument, NotFound
from common.rpc.status import error_from_rpc
from services.router import validation
from services.router.validation import ModelLimits, longest_request_bytes, resolve_sampling, validate
from tests.router.cluster import Cluster, running_cluster

LIMITS = ModelLimits(
    "bytes", context_length=512, vocab_size=300, eos_token_ids=(0,), has_chat_template=True, max_message_bytes=1 << 24
)
UINT32_MAX = 2**32 - 1


def make(**fields: object) -> inference_pb2.GenerateRequest:
    """A request; fields of `sampling` are given as `sampling__name`."""
    request = inference_pb2.GenerateRequest()
    if not {"text", "token_ids", "chat"} & fields.keys():
        request.text = "hello"
    for name, value in fields.items():
        owner = request.sampling if name.startswith("sampling__") else request
        name = name.removeprefix("sampling__")
        if name in ("stop", "stop_token_ids"):
            getattr(owner, name).extend(value)
        elif name == "logit_bias":
            request.sampling.logit_bias.update(value)  # type: ignore[call-overload]
        elif name in ("token_ids", "chat"):
            getattr(owner, name).CopyFrom(value)
        else:
            setattr(owner, name, value)
    return request


def outside(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats that are not in [low, high], NaN and infinities among them."""
    margin = 0.125  # a float of 32 bits represents it
    below = st.floats(max_value=low - margin, width=32, allow_nan=False)
    above = st.floats(min_value=high + margin, width=32, allow_nan=False)
    return st.one_of(st.just(math.nan), below, above)


def prompt_of(ids: list[int]) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=ids)


def chat_of(*messages: tuple[str, str]) -> inference_pb2.ChatMessages:
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )


WORDS = st.text(st.characters(codec="utf-8"), max_size=20)
# (fields, the field that the error must name): one strategy for each bound of the contract.
BAD: dict[str, st.SearchStrategy[tuple[dict[str, object], str]]] = {
    "no_prompt": st.just(({"text": ""}, "text")),
    "long_text": st.integers(512, 2000).map(lambda size: ({"text": "x" * size}, "text")),
    "no_tokens": st.just(({"token_ids": prompt_of([])}, "token_ids.ids")),
    "many_tokens": st.integers(512, 600).map(lambda size: ({"token_ids": prompt_of([1] * size)}, "token_ids.ids")),
    "token_id": st.integers(300, UINT32_MAX).map(lambda i: ({"token_ids": prompt_of([1, i, 2])}, "token_ids.ids[1]")),
    "no_messages": st.just(({"chat": chat_of()}, "chat.messages")),
    "role": st.just(({"chat": chat_of(("", "hi"))}, "chat.messages[0].role")),
    "long_role": st.just(({"chat": chat_of(("user", "a"), ("x" * 65, "hi"))}, "chat.messages[1].role")),
    "long_chat": st.just(({"chat": chat_of(("user", "x" * 600))}, "chat")),
    "n": st.one_of(st.just(0), st.integers(17, UINT32_MAX)).map(lambda n: ({"n": n}, "n")),
    "stops": st.integers(17, 40).map(lambda size: ({"stop": ["x"] * size}, "stop")),
    "empty_stop": st.just(({"stop": ["a", ""]}, "stop[1]")),
    "long_stop": st.integers(257, 400).map(lambda size: ({"stop": ["x" * size]}, "stop[0]")),
    "tenant": st.integers(129, 300).map(lambda size: ({"tenant": "x" * size}, "tenant")),
    "long_id": st.integers(129, 300).map(lambda size: ({"request_id": "x" * size}, "request_id")),
    "odd_id": st.sampled_from(["", "a\nb", "ä", "\x7f", "a\x00"]).map(lambda i: ({"request_id": i}, "request_id")),
    "max_tokens": st.one_of(st.just(0), st.integers(508, UINT32_MAX)).map(
        lambda value: ({"sampling__max_tokens": value}, "sampling.max_tokens")
    ),
    "min_tokens": st.integers(6, UINT32_MAX).map(
        lambda value: ({"sampling__max_tokens": 5, "sampling__min_tokens": value}, "sampling.min_tokens")
    ),
    "temperature": outside(0, 100).map(lambda v: ({"sampling__temperature": v}, "sampling.temperature")),
    "top_p": st.one_of(st.just(0.0), outside(0, 1)).map(lambda v: ({"sampling__top_p": v}, "sampling.top_p")),
    "min_p": outside(0, 1).map(lambda v: ({"sampling__min_p": v}, "sampling.min_p")),
    "presence": outside(-2, 2).map(lambda v: ({"sampling__presence_penalty": v}, "sampling.presence_penalty")),
    "frequency": outside(-2, 2).map(lambda v: ({"sampling__frequency_penalty": v}, "sampling.frequency_penalty")),
    "repetition": st.one_of(st.just(0.0), outside(0, 10)).map(
        lambda v: ({"sampling__repetition_penalty": v}, "sampling.repetition_penalty")
    ),
    "logprobs": st.integers(21, UINT32_MAX).map(lambda v: ({"sampling__logprobs": v}, "sampling.logprobs")),
    "bias_value": outside(-100, 100).map(lambda v: ({"sampling__logit_bias": {7: v}}, "sampling.logit_bias[7]")),
    "bias_token": st.integers(300, UINT32_MAX).map(
        lambda v: ({"sampling__logit_bias": {v: 1.0}}, "sampling.logit_bias")
    ),
    "stop_token": st.integers(300, UINT32_MAX).map(
        lambda v: ({"sampling__stop_token_ids": [v]}, "sampling.stop_token_ids")
    ),
    "stop_tokens": st.integers(65, 90).map(
        lambda size: ({"sampling__stop_token_ids": [1] * size}, "sampling.stop_token_ids")
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Cluster]]:
    """One cluster for all examples: nothing of them may leave a trace in it."""
    with asyncio.Runner() as runner:
        context = running_cluster(tmp_path_factory.mktemp("checkpoint"))
        cluster = runner.run(context.__aenter__())
        yield runner, cluster
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_field_out_of_bounds_is_refused_at_the_edge(kind: str, served: tuple[asyncio.Runner, Cluster]) -> None:
    runner, cluster = served

    @settings(deadline=None, max_examples=8)
    @given(BAD[kind])
    def check(example: tuple[dict[str, object], str]) -> None:
        fields, field = example
        error = runner.run(refusal(cluster, make(**fields)))
        assert isinstance(error, InvalidArgument), error
        assert error.field == field
        assert error.limit
        assert cluster.num_opened == cluster.num_prefills == 0

    check()


async def refusal(cluster: Cluster, request: inference_pb2.GenerateRequest) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request)
    return error_from_rpc(caught.value)


def test_every_field_of_the_request_has_a_bad_example() -> None:
    named = {field.removeprefix("sampling.").split("[")[0].split(".")[0] for _, field in map(_first, BAD.values())}
    free = {"model", "include_stop_in_output", "sampling", "seed", "top_k", "ignore_eos"}
    fields = {f.name for f in inference_pb2.GenerateRequest.DESCRIPTOR.fields}
    fields |= {f.name for f in inference_pb2.GenerateRequest().sampling.DESCRIPTOR.fields}
    assert fields - free == named


def _first(strategy: st.SearchStrategy[tuple[dict[str, object], str]]) -> tuple[dict[str, object], str]:
    found: list[tuple[dict[str, object], str]] = []

    @settings(deadline=None, max_examples=1, database=None)
    @given(strategy)
    def take(example: tuple[dict[str, object], str]) -> None:
        found.append(example)

    take()
    return found[0]


def test_an_unknown_model_is_not_found(served: tuple[asyncio.Runner, Cluster]) -> None:
    runner, cluster = served
    assert isinstance(runner.run(refusal(cluster, make(model="other"))), NotFound)
    assert cluster.num_opened == 0


@pytest.mark.parametrize("field", ["stop", "sampling.logit_bias", "sampling.stop_token_ids"])
def test_too_many_entries_are_refused_before_any_is_looked_at(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> None:
        raise AssertionError("entries were looked at")

    monkeypatch.setattr(validation, "validate_stop_strings", look)
    monkeypatch.setattr(validation, "_check_sampling", look)
    biases = dict.fromkeys(range(2000), 1.0)
    value = {"stop": [""] * 2000, "sampling.logit_bias": biases, "sampling.stop_token_ids": [1] * 2000}[field]
    with pytest.raises(InvalidArgument) as caught:
        validate(make(**{field.replace(".", "__"): value}), LIMITS)
    assert (caught.value.field, caught.value.value) == (field, "2000")


def test_a_request_without_a_prompt_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="prompt"):
        validate(inference_pb2.GenerateRequest(), LIMITS)


def test_a_message_above_the_limit_reaches_no_worker(served: tuple[asyncio.Runner, Cluster]) -> None:
    runner, cluster = served
    most = longest_request_bytes(LIMITS.context_length)
    error = runner.run(refusal(cluster, make(text="x" * (most + 1))))
    assert isinstance(error, InvalidArgument)
    assert error.field == "request"
    assert f"at most {most} bytes" in error.limit
    far_above = runner.run(refusal(cluster, make(text="x" * (2 * most + 1))))
    assert "larger than max" in str(far_above)
    assert cluster.num_opened == 0


@settings(deadline=None, max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 16),
            "tenant": WORDS,
            "stop": st.lists(WORDS.filter(bool), max_size=16),
            "sampling__max_tokens": st.integers(1, 507),
            "sampling__temperature": st.floats(0, 10, width=32),
            "sampling__top_p": st.floats(0.5, 1, width=32),
            "sampling__top_k": st.integers(0, 1000),
            "sampling__seed": st.integers(0, 2**64 - 1),
            "sampling__logprobs": st.integers(0, 20),
            "sampling__logit_bias": st.dictionaries(st.integers(0, 299), st.floats(-100, 100, width=32)),
            "sampling__stop_token_ids": st.lists(st.integers(0, 299), max_size=64),
            "sampling__ignore_eos": st.booleans(),
        },
    )
)
def test_what_is_within_bounds_is_resolved_as_given(fields: dict[str, object]) -> None:
    request = make(**fields)
    sampling = resolve_sampling(validate(request, LIMITS), 5, LIMITS)
    unset = {f.name for f in sampling.DESCRIPTOR.fields if f.has_presence} - {f.name for f, _ in sampling.ListFields()}
    assert unset <= {"logprobs"}
    for field, value in request.sampling.ListFields():
        assert getattr(sampling, field.name) == value
    assert sampling.max_tokens == (request.sampling.max_tokens or 507)


def test_a_seed_is_drawn_if_none_is_given() -> None:
    seeds = {validate(make(), LIMITS).seed for _ in range(4)}
    assert len(seeds) == 4
