"""The hello frame."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import FailedPrecondition
from common.transport.hello import HELLO_BYTES, Hello, decode_hello

NAMES = st.text(min_size=1, max_size=63).filter(lambda name: all(ord(c) < 0xD800 or ord(c) > 0xDFFF for c in name))


@settings(deadline=None, max_examples=100)
@given(NAMES, st.integers(0, (1 << 64) - 1), st.binary(min_size=16, max_size=16))
def test_a_hello_survives_the_wire(name: str, tag_key: int, secret: bytes) -> None:
    frame = Hello(name, tag_key, secret).encode()
    assert len(frame) == HELLO_BYTES
    assert decode_hello(frame) == Hello(name, tag_key, secret)


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES))
def test_noise_is_no_hello(frame: bytes) -> None:
    with pytest.raises(FailedPrecondition):
        decode_hello(frame)


@pytest.mark.parametrize(("offset", "value"), [(0, b"X"), (4, b"\x01"), (6, b"\x00"), (7, b"\x01"), (32, b"\xff")])
def test_each_field_is_checked(offset: int, value: bytes) -> None:
    frame = Hello("n", 1).encode()
    frame[offset : offset + 1] = value
    with pytest.raises(FailedPrecondition):
        decode_hello(frame)


def test_a_cut_hello_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="bytes"):
        decode_hello(Hello("n", 1).encode()[:-1])
