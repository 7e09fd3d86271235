"""Cuts a byte stream of server-sent events into the data of each event. Pure; knows no JSON and no HTTP."""

from __future__ import annotations

from common.errors import InternalError

_MAX_EVENT_BYTES = 16 << 20


class EventSplitter:
    """Takes bytes as they come, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that is now complete: each `data:` line is one, other fields are left out.

        Servers of this interface never put one event on several lines.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise InternalError(f"an event of more than {_MAX_EVENT_BYTES} bytes")
        return [line[len(b"data:") :].strip() for line in lines if line.startswith(b"data:")]
