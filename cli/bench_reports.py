"""Where the reports of `baton bench` go: checked before a run, written after it, and never lost when that fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import FailedPrecondition, InvalidArgument

JSON_FLAG = "--json"
HTML_FLAG = "--html"


@dataclass(frozen=True, slots=True)
class Report:
    """One file that can be asked for."""

    flag: str
    path: Path | None  # None: it was not
    write: Callable[[Path], None]


def numbered(path: Path | None, num_runs: int) -> list[Path | None]:
    """A path for each run: `run.json` alone, or `run.1.json`, `run.2.json` and so on."""
    if path is None or num_runs == 1:
        return [path] * num_runs
    return [path.with_name(f"{path.stem}.{number}{path.suffix}") for number in range(1, num_runs + 1)]


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


def write_reports(reports: Sequence[Report]) -> None:
    """Write all of them. If one cannot be written, the JSON that is in no file goes to temporary ones, which stay."""
    failures = [(report, error) for report in reports if (error := _write(report)) is not None]
    if not failures:
        return
    failed, error = failures[0]
    unwritten = [report for report, _ in failures]
    kept = [
        _keep(report) if report.path is None or report in unwritten else report.path
        for report in reports
        if report.flag == JSON_FLAG
    ]
    where = f"what was measured is kept in {', '.join(map(str, kept))}"
    raise FailedPrecondition(f"{failed.flag} {failed.path} cannot be written: {error.strerror}; {where}") from error


def _write(report: Report) -> OSError | None:
    try:
        if report.path is not None:
            report.write(report.path)
    except OSError as error:
        return error
    return None


def _keep(report: Report) -> Path:
    with tempfile.NamedTemporaryFile(prefix="baton-bench-", suffix=".json", delete=False) as file:
        path = Path(file.name)
    report.write(path)
    return path
