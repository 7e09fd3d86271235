"""Runs the tests that are marked `gpu` in several processes at once, and says what each of them found.

    python -m tests.gpu_suite [--processes N] [--timeout-s S] [paths]

Most of their time is compiling kernels, which takes one core each. Tests are dealt out one by one, so that those of one
function, which often compile the same, share Triton's cache on disk but wait for nobody.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PYTEST: Final = (sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--rootdir", ".", "-q", "-m", "gpu")
MAX_PROCESSES: Final = 16  # each takes half a GiB of a GPU
COLLECTION_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Share:
    """Some of the tests, in a process of their own."""

    num_tests: int
    process: subprocess.Popen[bytes]
    output: Path

    def finish(self, deadline_s: float) -> bool:
        """Wait until it ends, and print what it said: all of it if something failed. Returns whether nothing did."""
        try:
            status = self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = -1
        said = self.output.read_text(errors="replace").strip()
        print(said if status else said.splitlines()[-1], flush=True)
        if status == -1:
            print(f"NOT IN TIME: {self.num_tests} tests, of which some may have passed", flush=True)
        return status == 0


def collect(paths: Sequence[str]) -> list[str]:
    """The ids of the marked tests."""
    done = subprocess.run(
        [*PYTEST, "--collect-only", *paths],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=COLLECTION_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the tests cannot be collected:\n{done.stdout}")
    return [line for line in done.stdout.splitlines() if line.partition("::")[0].endswith(".py")]


def deal(tests: Sequence[str], num_shares: int) -> list[list[str]]:
    """One after the other, none without a test."""
    return [list(tests[first::num_shares]) for first in range(min(num_shares, len(tests)))]


def start(tests: Sequence[str], output: Path) -> Share:
    """What it says goes to the file."""
    with output.open("wb") as file:
        process = subprocess.Popen([*PYTEST, *tests], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return Share(len(tests), process, output)


def main() -> int:
    """Returns the exit status: 0 if all passed, or were skipped for want of hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(MAX_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--timeout-s", type=float, default=540.0, help="for everything")
    parser.add_argument("paths", nargs="*")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    tests = collect(arguments.paths)
    with tempfile.TemporaryDirectory() as directory:
        dealt = enumerate(deal(tests, arguments.processes))
        shares = [start(own, Path(directory, str(number))) for number, own in dealt]
        print(f"{len(tests)} tests in {len(shares)} processes", flush=True)
        passed = [share.finish(began_s + arguments.timeout_s) for share in shares]
    took_s = time.monotonic() - began_s
    print(f"{sum(passed)} of {len(shares)} processes found nothing, in {took_s:.0f} s", flush=True)
    return 0 if tests and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
