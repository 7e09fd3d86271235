"""The log file of a process that is started again and again, and the last that its present run wrote there."""

from __future__ import annotations

from pathlib import Path
from typing import IO

_TAIL_BYTES = 64 << 10
_MAX_SHOWN_CHARS = 500


class ProcessLog:
    """Appends to `path`, whose directory it makes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: IO[bytes] = path.open("ab")
        self._run_begins = 0

    def begin_run(self) -> IO[bytes]:
        """Where the next run of the process writes."""
        self._run_begins = self._file.seek(0, 2)
        return self._file

    def last_line(self) -> str:
        """Of the present run; empty if it has written nothing."""
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(self._run_begins, end - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return line if len(line) <= _MAX_SHOWN_CHARS else f"{line[: _MAX_SHOWN_CHARS - 3]}..."

    def close(self) -> None:
        self._file.close()
