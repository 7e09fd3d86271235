"""The last line of a process's log: of its present run, however long it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cli.process_log import ProcessLog


def run(log: ProcessLog, script: str) -> None:
    file = log.begin_run()
    subprocess.run(["sh", "-c", script], stdout=file, check=True)


def test_it_is_the_last_line_of_the_present_run_that_says_something(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "made" / "worker.log")
    run(log, "echo first; echo second; echo; echo '  '")
    assert log.last_line() == "second"
    run(log, "true")
    assert log.last_line() == ""
    run(log, r"printf 'no end \377'")
    assert log.last_line() == "no end \ufffd"
    log.close()
    assert log.path.read_bytes().startswith(b"first\n")


def test_a_long_line_is_cut_and_a_long_log_read_at_its_end(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "worker.log")
    run(log, "head -c 200000 /dev/zero | tr '\\0' x; echo; head -c 600 /dev/zero | tr '\\0' y")
    assert log.last_line() == "y" * 497 + "..."
    log.close()
