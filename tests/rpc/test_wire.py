"""Fields are counted as a parser finds them, and bytes that are no message never break the count."""

from __future__ import annotations

from baton.v1 import inference_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rpc.wire import has_more_fields

DESCRIPTOR = inference_pb2.GenerateRequest.DESCRIPTOR


def num_fields(raw: bytes) -> int:
    return next(most for most in range(10_000) if not has_more_fields(raw, DESCRIPTOR, most))


def test_fields_and_those_of_messages_in_it_are_counted() -> None:
    request = inference_pb2.GenerateRequest(model="m", n=300, stop=["a", "b"])
    assert num_fields(request.SerializeToString()) == 4
    request.chat.messages.add(role="user", content="x" * 300)
    request.chat.messages.add()
    assert num_fields(request.SerializeToString()) == 4 + 1 + 2 + 2
    request.sampling.temperature = 0.5
    request.sampling.logit_bias[3] = 1.5
    assert num_fields(request.SerializeToString()) == 9 + 1 + 1 + 1 + 2


def test_packed_numbers_are_one_field_and_unpacked_ones_many() -> None:
    request = inference_pb2.GenerateRequest()
    request.token_ids.ids.extend(range(1000))
    assert num_fields(request.SerializeToString()) == 2
    number = inference_pb2.GenerateRequest.TOKEN_IDS_FIELD_NUMBER
    assert num_fields(bytes([number << 3 | 2, 20]) + b"\x08\x05" * 10) == 11


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_counted(raw: bytes) -> None:
    assert not has_more_fields(raw, DESCRIPTOR, 2 * len(raw))
    assert has_more_fields(raw, DESCRIPTOR, 0) is bool(raw)
