"""Events come out whole however the bytes were cut."""

from __future__ import annotations

import pytest

from common.errors import InternalError
from loadtest.targets import sse
from loadtest.targets.sse import EventSplitter

_STREAM = b'data: {"a": 1}\n\n: comment\nevent: x\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\n'
_EVENTS = [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(num_bytes: int) -> None:
    splitter = EventSplitter()
    events = []
    for start in range(0, len(_STREAM), num_bytes):
        events += splitter.feed(_STREAM[start : start + num_bytes])
    assert events == _EVENTS


def test_an_event_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_MAX_EVENT_BYTES", 100)
    splitter = EventSplitter()
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(InternalError, match="more than 100 bytes"):
        splitter.feed(b"x" * 90)
