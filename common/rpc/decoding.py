"""Messages from their bytes, as servers take them: what cannot be decoded is the caller's fault, and what no field
names is not kept. Knows no message and no service.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from common.errors import InvalidArgument
from common.rpc.wire import has_more_fields

_logger = logging.getLogger(__name__)

SAY_EVERY_S = 10.0  # a line in the log about messages that cannot be decoded
LARGE_BYTES = 64 << 10  # below, what a message holds in vain is worth neither a look nor a copy
MAX_FIELDS = 1 << 14  # in a message and those in it; numbers travel packed, and take what they take


def decoder(
    parse: Callable[[bytes], Any] | None, method: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[bytes], Any] | None:
    """`parse` for what is sent to `method`. Raises `InvalidArgument` for bytes that are no such message."""
    if parse is None:
        return None
    said_s = -SAY_EVERY_S
    descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)

    def decode(raw: bytes) -> Any:
        nonlocal said_s
        if descriptor is not None and len(raw) >= LARGE_BYTES and has_more_fields(raw, descriptor, MAX_FIELDS):
            raise InvalidArgument("message", f"{len(raw)} bytes", f"at most {MAX_FIELDS} fields and entries of lists")
        try:
            message = parse(raw)
        except DecodeError as error:
            if clock() - said_s >= SAY_EVERY_S:
                said_s = clock()
                _logger.warning("%s: %d bytes that cannot be decoded", method, len(raw))
            raise InvalidArgument("message", f"{len(raw)} bytes", "cannot be decoded") from error
        return message if len(raw) < LARGE_BYTES else _known_fields(message, len(raw))

    return decode


def _known_fields(message: Message, num_bytes: int) -> Message:
    """Discarding fields frees no memory while the message lives: if they were many, what is left moves out."""
    message.DiscardUnknownFields()
    if 2 * message.ByteSize() > num_bytes:
        return message
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
