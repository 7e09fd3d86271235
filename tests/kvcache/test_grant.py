"""Grants: the 64-bit tag."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument
from common.kvcache.grant import SlotHandle, make_tag

exhaustive = settings(deadline=None, max_examples=200, derandomize=True, database=None)
uint8 = st.integers(0, 2**8 - 1)


@exhaustive
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), uint8, uint8)
def test_each_field_has_bits_of_its_own(nonce: int, generation: int, slot: int, leg: int) -> None:
    tag = make_tag(nonce, generation, slot, leg)
    assert (tag >> 32, tag >> 16 & 0xFFFF, tag >> 8 & 0xFF, tag & 0xFF) == (nonce, generation, slot, leg)


def test_the_fields_lie_where_the_drawing_says() -> None:
    assert make_tag(0x01020304, 0x0506, 0x07, 0x08) == 0x0102030405060708


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ((2**32, 0, 0, 0), "nonce"),
        ((0, 2**16, 0, 0), "generation"),
        ((0, 0, 2**8, 0), "slot"),
        ((0, 0, 0, 2**8), "leg"),
        ((0, 0, 0, -1), "leg"),
    ],
)
def test_a_field_that_does_not_fit_is_refused(parts: tuple[int, int, int, int], field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        make_tag(*parts)


def test_a_handle_makes_the_tags_of_its_legs() -> None:
    handle = SlotHandle(slot=3, generation=9, nonce=5)
    assert handle.tag(leg=2) == make_tag(5, 9, 3, 2)
