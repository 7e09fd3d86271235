"""One line of JSON for each request at its end, the same way in every service. Knows no service.

The request's id is in the lines of all services that it came through. Times are in milliseconds, as `*_ms`.
"""

from __future__ import annotations

import json
import logging

Field = str | int | float | None


class RequestLog:
    """The logger `baton.<service>.request`."""

    def __init__(self, service: str) -> None:
        self._logger = logging.getLogger(f"baton.{service}.request")

    @property
    def is_on(self) -> bool:
        """Whether lines go anywhere: what they say need not be gathered otherwise."""
        return self._logger.isEnabledFor(logging.INFO)

    def write(self, request_id: str, outcome: str, **fields: Field) -> None:
        """The request is over. `outcome` is `ok`, or the name of what ended it."""
        self._logger.info("%s", json.dumps({"request_id": request_id, "outcome": outcome, **fields}))


def milliseconds(duration_ns: int) -> float:
    """A duration as the lines have it."""
    return round(duration_ns / 1e6, 3)
