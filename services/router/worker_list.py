"""Which workers are listed: their addresses and what they are for, from a file that is read again when it changes."""

from __future__ import annotations

import enum
import logging
import tomllib
from pathlib import Path

from baton.v1 import worker_pb2

from common.config import split_address

_logger = logging.getLogger(__name__)


class Role(enum.Enum):
    """What a worker is for."""

    PREFILL = worker_pb2.WORKER_ROLE_PREFILL
    DECODE = worker_pb2.WORKER_ROLE_DECODE


class WorkersFile:
    """A TOML file with `prefill` and `decode`, each a list of addresses."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None  # of what was read last
        self._error = ""  # as was logged

    def read(self) -> set[tuple[str, Role]] | None:
        """The file's workers; None if it has not changed, or cannot be read, which is logged: the last ones stay."""
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return None
            listed = parse_workers(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if str(error) != self._error:
                self._error = str(error)
                _logger.error("workers file %s cannot be read, the last list stays: %s", self._path, error)
            return None
        self._error = ""
        self._stamp = stamp
        return listed


def parse_workers(text: str) -> set[tuple[str, Role]]:
    """Raises `ValueError` for what is no such file."""
    content = tomllib.loads(text)
    listed: set[tuple[str, Role]] = set()
    for name, addresses in content.items():
        role = {"prefill": Role.PREFILL, "decode": Role.DECODE}.get(name)
        if role is None or not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
            raise ValueError(f"{name}: expected `prefill` and `decode`, each a list of addresses")
        for address in addresses:
            split_address(address)  # as those in flags are checked
        listed |= {(address, role) for address in addresses}
    return listed
