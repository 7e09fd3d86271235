"""Where the reports of `baton bench` go: checked before a run, written after it, and never lost when that fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Report:
    """One file that was asked for."""

    flag: str
    path: Path
    write: Callable[[Path], None]


def check_writable(flag: str, path: Path | None) -> None:
    """Refuse a path that cannot be written now. Leaves no file behind that was not there."""
    if path is None:
        return
    was_there = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise InvalidArgument(flag, str(path), f"cannot be written: {error.strerror}") from error
    if not was_there:
        path.unlink()


def write_reports(reports: list[Report], write_all: Callable[[Path], None]) -> None:
    """Write them. If one cannot be written, `write_all` makes a temporary file that the error names."""
    for report in reports:
        try:
            report.write(report.path)
        except OSError as error:
            limit = f"cannot be written: {error.strerror}; what was measured is kept in {keep(write_all)}"
            raise InvalidArgument(report.flag, str(report.path), limit) from error


def keep(write_all: Callable[[Path], None]) -> Path:
    """Write to a temporary file, which stays. Returns its path."""
    with tempfile.NamedTemporaryFile(prefix="baton-bench-", suffix=".json", delete=False) as file:
        path = Path(file.name)
    write_all(path)
    return path
