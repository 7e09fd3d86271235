"""Ranks end together, whatever ends the first of them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rank_processes import TIMED_OUT, run_ranks

WAITS = "import pathlib, os, time; pathlib.Path({!r}).write_text(str(os.getpid())); time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_gone(pid: Path) -> bool:
    """Whether the process that wrote its id there runs no more; it may not have come so far."""
    try:
        os.kill(int(pid.read_text()), 0)
    except (ProcessLookupError, FileNotFoundError, ValueError):
        return True
    return False


def test_all_end_well() -> None:
    assert run_ranks([python("pass"), python("import sys; sys.exit(0)")], 60.0) == 0


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_raises_ends_the_other_within_seconds(
    failing: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pid = tmp_path / "pid"
    raises = python(f"import os.path, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.01)\n1 / 0")
    commands = [python(WAITS.format(str(pid)))]
    commands.insert(failing, raises)
    begun = time.monotonic()
    assert run_ranks(commands, 60.0) == 1
    assert time.monotonic() - begun < 20.0
    assert is_gone(pid)
    said = capfd.readouterr().err
    assert "ZeroDivisionError" in said
    assert f"rank {failing} ended with status 1" in said


def test_a_signal_is_a_failure() -> None:
    assert run_ranks([python("import os; os.kill(os.getpid(), 9)"), python("import time; time.sleep(600)")], 60.0) == -9


def test_ranks_that_take_too_long_are_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pids = [tmp_path / "0", tmp_path / "1"]
    assert run_ranks([python(WAITS.format(str(pid))) for pid in pids], 1.0) == TIMED_OUT
    assert all(map(is_gone, pids))
    assert "2 of 2 ranks were not done in time" in capfd.readouterr().err
