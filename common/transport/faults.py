"""Faults that `inproc` puts into single messages on request: named, scripted and repeatable.

It knows no chance and no time: a fault simulator decides per message, and holds are events that it sets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MessageInfo:
    """What a fault script sees of a message before it is carried."""

    sender: str
    receiver: str
    tag: int
    num_bytes: int
    index: int  # messages that the network has seen before this one


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one message. Fields combine, in the order of the message's way."""

    hold: asyncio.Event | None = None  # it stays on the wire, unmatched, until the event is set
    resize_bytes: int | None = None  # it arrives with another length (cut, or padded with zeros)
    flip_byte: int | None = None  # the byte at this offset arrives inverted
    stall: asyncio.Event | None = None  # half of it is written, the rest only after the event is set
    lose_connection: bool = False  # half of it is written, then the connection is lost


FaultScript = Callable[[MessageInfo], Fault | None]


def no_faults(_: MessageInfo) -> Fault | None:
    """The script of a healthy network."""
    return None
