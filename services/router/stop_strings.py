"""Finding stop strings in a stream of text, however it is cut into pieces.

The stop string that is complete first wins; of two that end together, the longer. So the answer is that of
a search over the whole text and does not depend on the pieces. This module is pure and knows nothing of
tokens or requests.
"""

from __future__ import annotations

from typing import Final

from common.errors import InvalidArgument

MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256


def validate_stop_strings(stops: tuple[str, ...]) -> None:
    """Raise `InvalidArgument` for too many, too long or empty stop strings."""
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidArgument("stop", len(stops), f"at most {MAX_STOP_STRINGS} stop strings")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
            raise InvalidArgument(f"stop[{index}]", stop, f"must have 1 to {MAX_STOP_STRING_CHARS} characters")


class StopStringMatcher:
    """The state of one stream. Text that could begin a stop string is held back until that is decided."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        validate_stop_strings(stops)
        self._stops = stops
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the stream."""
        return self._matched

    def push(self, delta: str) -> tuple[str, bool]:
        """Text that may be given out, and whether a stop string was found. After a match all text is dropped."""
        if self._matched is not None:
            return "", True
        if not self._stops:
            return delta, False
        text = self._held + delta
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return text[:start], True
        safe = min(_undecided_from(text, stop) for stop in self._stops)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """What is held back, at the end of the stream: nothing more can complete it."""
        held, self._held = self._held, ""
        return held


def _undecided_from(text: str, stop: str) -> int:
    """Where the longest end of the text begins that is a proper beginning of the stop string."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
