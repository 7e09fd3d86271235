"""Protobuf's wire format, as far as it takes to count what a message would hold: two bytes may become a hundred.

Pure. Knows messages by their descriptors, and no message.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.descriptor import Descriptor

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES: Final = {_FIXED64: 8, _FIXED32: 4}
_MORE: Final = 0x80  # in a byte of a varint: another follows


def has_more_fields(raw: bytes, descriptor: Descriptor, most: int) -> bool:
    """Whether a message and those in it have more than `most` fields, each entry of a repeated one counted unless it is
    packed. Stops there, or where the bytes are no message, which is for the parser to say."""
    num_fields = 0
    parts: list[tuple[int, int, Descriptor]] = [(0, len(raw), descriptor)]
    try:
        while parts:
            at, end, kind = parts.pop()
            while at < end:
                num_fields += 1
                if num_fields > most:
                    return True
                tag, at = _varint(raw, at)
                wire_type = tag & 7
                if wire_type == _VARINT:
                    _, at = _varint(raw, at)
                elif wire_type == _LENGTH:
                    num_bytes, at = _varint(raw, at)
                    inner = _message_type(kind, tag >> 3)
                    if inner is not None:
                        parts.append((at, min(at + num_bytes, end), inner))
                    at += num_bytes
                else:
                    at += _FIXED_BYTES.get(wire_type, 0)
    except IndexError:
        pass  # cut short
    return False


def _message_type(kind: Descriptor, number: int) -> Descriptor | None:
    field = kind.fields_by_number.get(number)
    return None if field is None else field.message_type


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number there and where it ends. Raises `IndexError` if it does not."""
    byte = raw[at]
    if byte < _MORE:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while byte >= _MORE:
        at += 1
        byte = raw[at]
        if shift < 64:  # longer ones are no numbers: the parser says so
            value |= (byte & 0x7F) << shift
        shift += 7
    return value, at + 1
