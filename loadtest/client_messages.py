"""What the generator and its client processes say to each other: lines of JSON, typed and validated by msgspec.

generator                       client process
ClientSpec       ─────────────►            opens the target
                 ◄─────────────  Ready
Start            ─────────────►            an agreed moment of the shared monotonic clock
PlannedRequest … ─────────────►            read as fast as they are made ready
PlanEnd          ─────────────►            end of input without it: the generator is gone, so stop
                 ◄─────────────  Recorded … as requests end
                 ◄─────────────  Finished, or Failed at any time
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from common.errors import InternalError
from loadtest.prompts import PromptSpec
from loadtest.record import RequestRecord
from loadtest.sender import SendOptions
from loadtest.targets.base import TargetSpec
from loadtest.workload import PlannedRequest

MAX_RECORD_BYTES = 64 << 20  # a line: a record has an entry for each message; an output of a million tokens fits
# A line the other way: the blocks of the longest prompt that a trace may have fit. Small, for it also bounds how far
# the generator runs ahead.
MAX_REQUEST_BYTES = 256 << 10


class ClientSpec(msgspec.Struct, frozen=True, tag="spec"):
    """What to send to, from what, and how."""

    target: TargetSpec
    prompts: PromptSpec
    options: SendOptions


class Start(msgspec.Struct, frozen=True, tag="start"):
    """0 of the run's clock."""

    at_s: float  # of the monotonic clock


class PlanEnd(msgspec.Struct, frozen=True, tag="end"):
    """There are no more requests."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The target answers."""


class Recorded(msgspec.Struct, frozen=True, tag="record"):
    """A request has ended."""

    record: RequestRecord


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The process cannot go on."""

    error: str  # name of the error's type
    message: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Everything that was sent has ended, and no record follows."""


ToClient: TypeAlias = ClientSpec | Start | PlannedRequest | PlanEnd
FromClient: TypeAlias = Ready | Recorded | Failed | Finished

_encode = msgspec.json.Encoder().encode
_to_client: msgspec.json.Decoder[ToClient] = msgspec.json.Decoder(ToClient)
_from_client: msgspec.json.Decoder[FromClient] = msgspec.json.Decoder(FromClient)
_Message = TypeVar("_Message")


def to_line(message: ToClient | FromClient) -> bytes:
    """One line, newline included."""
    return _encode(message) + b"\n"


def to_client(line: bytes) -> ToClient:
    """What a line from the generator says."""
    return _decoded(_to_client, line)


def from_client(line: bytes) -> FromClient:
    """What a line from a client process says."""
    return _decoded(_from_client, line)


def _decoded(decoder: msgspec.json.Decoder[_Message], line: bytes) -> _Message:
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise InternalError(f"not a message between generator and client: {line[:80]!r}: {error}") from error
