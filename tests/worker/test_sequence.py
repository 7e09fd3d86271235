"""What a worker takes from a router: everything in bounds, nothing else."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from baton.v1 import kv_pb2, sampling_pb2

from common.errors import DeadlineExceeded, InvalidArgument
from common.sampling.params import SamplingParams
from common.worker.sequence import SequenceLimits, SequenceRequest
from common.worker.step_plan import AddRow, pack_tokens

LIMITS = SequenceLimits(vocab_size=100, context_length=64)


def sequence_pb() -> kv_pb2.Sequence:
    return kv_pb2.Sequence(
        request_id="r-1",
        sequence_id=7,
        token_ids=[5, 6, 7, 8],
        num_prompt_tokens=3,
        sampling=sampling_pb2.SamplingParams(max_tokens=10, seed=3, temperature=0.5, stop_token_ids=[9]),
        choice=2,
        tenant="blue",
        timeout_ns=2_500_000_000,
        eos_token_ids=[1],
    )


def test_fields_are_taken_over_and_the_deadline_is_local() -> None:
    request = SequenceRequest.from_proto(sequence_pb(), 100.0, LIMITS)
    assert request.token_ids == array("I", [5, 6, 7, 8])
    assert request.num_output_tokens == 1
    assert request.deadline_s == 102.5
    assert request.sampling == SamplingParams(
        max_tokens=10, seed=3, choice=2, temperature=0.5, stop_token_ids=(9,), eos_token_ids=(1,)
    )
    assert request.add_row(4) == AddRow(4, request.sampling, pack_tokens([5, 6, 7]), pack_tokens([8]))


@pytest.mark.parametrize(
    ("name", "most"), [("token_ids", 63), ("eos_token_ids", 64), ("stop_token_ids", 64), ("logit_bias", 1024)]
)
def test_long_lists_are_counted_before_they_are_walked(name: str, most: int) -> None:
    pb = sequence_pb()
    if name == "logit_bias":
        pb.sampling.logit_bias.update(dict.fromkeys(range(5000), 1.0))
    else:
        getattr(pb.sampling if name == "stop_token_ids" else pb, name).extend([1] * 5000)
    with pytest.raises(InvalidArgument, match=f"{name} = .*0 to {most} entries"):
        SequenceRequest.from_proto(pb, 0.0, LIMITS)


def test_unset_sampling_fields_take_the_protocols_defaults() -> None:
    pb = sequence_pb()
    pb.sampling.ClearField("temperature")
    sampling = SequenceRequest.from_proto(pb, 0.0, LIMITS).sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1.0, 1.0, 1.0)
    assert sampling.logprobs is None


def _set(**fields: object) -> Callable[[kv_pb2.Sequence], None]:
    def change(pb: kv_pb2.Sequence) -> None:
        for name, value in fields.items():
            target = pb.sampling if name in pb.sampling.DESCRIPTOR.fields_by_name else pb
            if isinstance(value, list):
                target.ClearField(name)  # type: ignore[arg-type]
                getattr(target, name).extend(value)
            else:
                setattr(target, name, value)

    return change


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("request_id", _set(request_id="")),
        ("request_id", _set(request_id="x" * 129)),
        ("request_id", _set(request_id="a\nb")),
        ("tenant", _set(tenant="t" * 129)),
        ("num_prompt_tokens", _set(num_prompt_tokens=0)),
        ("num_prompt_tokens", _set(num_prompt_tokens=5)),
        ("num_prompt_tokens", _set(token_ids=[])),
        ("token_ids", _set(token_ids=[1, 2, 100])),
        ("token_ids", _set(token_ids=[1] * 64)),
        ("token_ids", _set(token_ids=[1] * 13)),  # ten output tokens already, of ten
        ("timeout_ns", _set(timeout_ns=1 << 63)),
        ("max_tokens", _set(max_tokens=62)),  # three of prompt and 62 exceed the context
        ("temperature", _set(temperature=float("nan"))),
        ("top_p", _set(top_p=0.0)),
        ("logprobs", _set(logprobs=1000)),
        ("stop_token_ids", _set(stop_token_ids=[100])),
        ("eos_token_ids", _set(eos_token_ids=[100])),
        ("choice", _set(choice=1 << 20)),
        ("max_tokens", lambda pb: pb.sampling.ClearField("max_tokens")),
        ("seed", lambda pb: pb.sampling.ClearField("seed")),
    ],
)
def test_what_is_out_of_bounds_is_named(field: str, change: Callable[[kv_pb2.Sequence], None]) -> None:
    pb = sequence_pb()
    change(pb)
    with pytest.raises(InvalidArgument) as raised:
        SequenceRequest.from_proto(pb, 0.0, LIMITS)
    assert raised.value.field.split(".")[-1] == field


def test_no_time_left_is_a_deadline_that_passed() -> None:
    pb = sequence_pb()
    pb.timeout_ns = 0
    with pytest.raises(DeadlineExceeded):
        SequenceRequest.from_proto(pb, 0.0, LIMITS)


def test_output_ends_with_an_ending_token_or_its_last_one() -> None:
    request = SequenceRequest.from_proto(sequence_pb(), 0.0, LIMITS)
    assert request.finish_reason(50, 1) == sampling_pb2.FINISH_REASON_UNSPECIFIED
    assert request.finish_reason(9, 1) == sampling_pb2.FINISH_REASON_STOP
    assert request.finish_reason(1, 1) == sampling_pb2.FINISH_REASON_STOP
    assert request.finish_reason(50, 9) == sampling_pb2.FINISH_REASON_LENGTH
    assert request.finish_reason(1, 9) == sampling_pb2.FINISH_REASON_STOP


def test_end_of_sequence_does_not_end_an_output_that_ignores_it() -> None:
    pb = sequence_pb()
    pb.sampling.ignore_eos = True
    request = SequenceRequest.from_proto(pb, 0.0, LIMITS)
    assert request.finish_reason(1, 1) == sampling_pb2.FINISH_REASON_UNSPECIFIED
