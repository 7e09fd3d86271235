"""`baton demo` as a user runs it: it shows where a request's time went, ends by itself and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from cli.demo import PROMPT_END

DEMO = (sys.executable, "-m", "cli.main", "demo")
PHASES = ("queue", "prefill", "grant", "transfer", "verify", "decode queue", "decode")
BLOCK_SIZE = 64
NUM_PROCESSES = 6  # router, two fronts, three ranks


async def test_demo_shows_the_lifetime_of_a_request_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = _descendants()
    try:
        async with asyncio.timeout(90.0):
            status, output, family = await _demo(tmp_path)
        _, alive = psutil.wait_procs(family, timeout=20.0)
        left = _descendants() - before
    finally:
        for process in _descendants() - before:
            process.kill()
    assert status == 0
    _the_path_was_real(output)
    assert len(family) >= NUM_PROCESSES
    assert not alive
    assert not left
    assert not _names_in(tmp_path), "logs and sockets go with the processes"


async def _demo(directory: Path) -> tuple[int | None, str, set[psutil.Process]]:
    """Exit status, what was printed, and the processes that it was seen to have."""
    environment = os.environ | {"TMPDIR": str(directory)}
    demo = await asyncio.create_subprocess_exec(*DEMO, env=environment, stdout=asyncio.subprocess.PIPE)
    assert demo.stdout is not None
    family: set[psutil.Process] = set()
    running = asyncio.create_task(demo.communicate())
    while not running.done():  # looked at all the time: once it is ready, it is soon over
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update(psutil.Process(demo.pid).children(recursive=True))
        await asyncio.wait({running}, timeout=0.2)
    output, _ = await running
    return demo.returncode, output.decode(), family


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _the_path_was_real(output: str) -> None:
    generated = output.partition(PROMPT_END)[2].partition("lifetime")[0]
    assert generated.strip()
    for phase in PHASES:
        assert float(_cell(output, phase)) >= 0
    assert _milliseconds(output, "TTFT") > 0
    assert _milliseconds(output, "TPOT") > 0
    num_prompt_tokens = int(_cell(output, "prompt tokens").split()[0])
    assert _cell(output, "blocks").startswith(f"{-(-num_prompt_tokens // BLOCK_SIZE)} shipped")
    assert int(_cell(output, "bytes shipped").replace(",", "")) > 0
    assert _cell(output, "transport").startswith("ucx:")
    assert _cell(output, "workers") == "prefill-0 → decode-0"


def _cell(output: str, name: str) -> str:
    """What stands beside `name` in a table."""
    found = re.search(rf"^│ {re.escape(name)} +│ *([^│]*?) *│", output, re.MULTILINE)
    assert found is not None, f"no row {name!r} in:\n{output}"
    return found[1]


def _milliseconds(output: str, name: str) -> float:
    value, unit = _cell(output, name).split()
    assert unit == "ms"
    return float(value)


def _names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}
