"""Logs: one line of JSON for each request at its end, the same way in every service, and text for all else.

Knows no service. The request's id is in the lines of all services that it came through. Times are in milliseconds,
as `*_ms`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

Field = str | int | float | None
_PREFIX, _SUFFIX = "baton.", ".request"
_GRPC_LOGGER = "grpc._cython.cygrpc"  # says, with a traceback, whatever a stranger's bytes did to a call
SAY_EVERY_S = 10.0  # a line of that


class RequestLog:
    """The logger `baton.<service>.request`. Where `configure_logging` was called, its lines are JSON alone."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._logger = logging.getLogger(f"{_PREFIX}{service}{_SUFFIX}")

    @property
    def is_on(self) -> bool:
        """Whether lines go anywhere: what they say need not be gathered otherwise."""
        return self._logger.isEnabledFor(logging.INFO)

    def write(self, request_id: str, outcome: str, **fields: Field) -> None:
        """The request is over. `outcome` is `ok`, or the name of what ended it."""
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "service": self._service, "request_id": request_id, "outcome": outcome, **fields}
        self._logger.info("%s", json.dumps(line))


class _Formatter(logging.Formatter):
    """Text for everything but requests, whose lines are JSON already."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name.startswith(_PREFIX) and record.name.endswith(_SUFFIX):
            return record.getMessage()
        return super().format(record)


class SayNowAndThen(logging.Filter):
    """Lets a line pass once in a while, without its traceback: for what anybody who reaches a port can bring about."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said_s = -SAY_EVERY_S
        self._num_unsaid = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Says in the next line how many there were since the last."""
        now_s = self._clock()
        if now_s - self._said_s < SAY_EVERY_S:
            self._num_unsaid += 1
            return False
        record.exc_info = record.exc_text = None
        if self._num_unsaid:
            record.msg, record.args = f"{record.getMessage()} (and {self._num_unsaid} others)", None
        self._said_s, self._num_unsaid = now_s, 0
        return True


def configure_logging(level: str, service: str) -> None:
    """For a `__main__`: everything from `level` on goes to standard error."""
    logging.getLogger(_GRPC_LOGGER).addFilter(SayNowAndThen())
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {service} %(process)d %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def milliseconds(duration_ns: int) -> float:
    """A duration as the lines have it."""
    return round(duration_ns / 1e6, 3)
