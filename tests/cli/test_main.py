"""The command line as a user runs it: a deployment that comes up, answers and leaves nothing behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cli.main import main

BATON = (sys.executable, "-m", "cli.main")


async def _run(*args: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *BATON, *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def _names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
async def test_up_serves_until_it_is_told_to_stop_and_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    up = await asyncio.create_subprocess_exec(
        *BATON, "up", "--port", "0", "--log-dir", str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert up.stdout is not None
    address = ""
    async with asyncio.timeout(60.0):
        while not address:
            line = (await up.stdout.readline()).decode()
            assert line, "baton up ended before it was ready"
            if line.startswith("ready:"):
                address = line.split("--address ")[1].split()[0]
    family = psutil.Process(up.pid).children(recursive=True)
    assert len(family) >= 5, "router, two fronts and two ranks"
    status, text = await _run("generate", "def merge(", "--max-tokens", "5", "--temperature", "0", "--address", address)
    assert status == 0
    assert text.strip()
    status, text = await _run("generate", "x", "--temperature", "-1", "--address", address)
    assert status == 1
    assert "sampling.temperature" in text
    up.send_signal(number)
    await up.communicate()
    assert up.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=20.0)
    assert not alive
    assert _names_in(tmp_path) == {"router.log", "prefill-0.log", "decode-0.log"}


def test_unreachable_router_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--address", "127.0.0.1:9", "--timeout", "5"]) == 1
    assert "Unavailable" in capsys.readouterr().err
