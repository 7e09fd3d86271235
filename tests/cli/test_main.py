"""The command line as a user runs it: a deployment that comes up, answers and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cli.main import COMMANDS, main

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
    status, text = await _run("generate", "x", "--model", "another", "--address", address)
    assert status == 1
    assert "model 'another' is not served here" in text
    up.send_signal(number)
    await up.communicate()
    assert up.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=20.0)
    assert not alive
    assert _names_in(tmp_path) == {address.replace(":", "-")}, "a directory that no other deployment writes to"
    logs = tmp_path / address.replace(":", "-")
    assert _names_in(logs) == {"router.log", "prefill-0.log", "decode-0.log"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-tokens", "-3"],
        ["--max-tokens", "99999999999"],
        ["--top-k", "-1"],
        ["--seed", "-1"],
        ["--n", "-1"],
        ["--temperature", "nan"],
        ["--timeout", "inf"],
        ["--logprobs", "21"],
        ["--address", "nowhere"],
        ["--nonsense"],
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert arguments[0] in errors
    assert "--help" in errors


def test_an_argument_that_is_no_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "caf\udce9"]) == 2
    assert "argument 2 = 'caf\\udce9': not UTF-8" in capsys.readouterr().err


def test_alone_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"baton {metadata.version('baton')}\n"


def test_a_terminal_that_lacks_a_character_shows_its_number() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*BATON, "top", "--once", "--decode", "127.0.0.1:9"]
    process = subprocess.run(command, capture_output=True, env=environment)
    assert process.stderr == b""
    assert rb"blocks: \u2588 held" in process.stdout


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [*BATON, "top", "--once", "--decode", "127.0.0.1:9"], stdout=full, stderr=subprocess.PIPE
        )
    assert process.returncode == 1
    assert process.stderr == b"baton: OSError: [Errno 28] No space left on device\n"
