"""Whatever is typed after `baton` ends with a status and lines for a person, and never with a traceback.

No server is there to be reached, and no process may be started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.main import COMMANDS, build_parser, main
from common.errors import FailedPrecondition

NOBODY = "127.0.0.1:9"
VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                "-",
                "--",
                "0",
                "-1",
                "-3",
                "1",
                "2",
                "7",
                "0.5",
                "1e9",
                "1e400",
                "nan",
                "inf",
                "-inf",
                "99999999999",
            ),
            *(
                "9" * 5000,
                "\u0661",
                "0x10",
                "1_000",
                " 3 ",
                "a,b",
                ":",
                "[::1]:9",
                "127.0.0.1:70000",
                NOBODY,
                "nowhere:1",
            ),
            *("/", "/dev/null", "/dev/full", "/proc/self/mem", ".", "missing.jsonl", "missing.csv", "x" * 5000, "[/b]"),
            *("http://127.0.0.1:9", "http://", "ftp://x", "http://[", "uniform:1:2", "lognormal:9:1", "uniform:2:1"),
            *("caf\udce9", "\u2028", "é", "always", "cuda", "steady", "azure", "%s", "\n"),
        ]
    ),
    st.integers(-5, 70000).map(str),
    st.floats().map(str),
    st.text(st.characters(blacklist_characters="\0"), max_size=5),  # a system passes no zero byte
)


def flags_of(command: str) -> list[str]:
    """Those of one subcommand."""
    (subparsers,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    parser = subparsers.choices[command]
    return sorted(flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help"))


@st.composite
def command_lines(draw: st.DrawFn, command: str) -> list[str]:
    line = [command] + (["--once"] if command == "top" else [])  # without it, it stays
    line += draw(st.lists(VALUES, max_size=1))
    for flag in draw(st.lists(st.sampled_from(flags_of(command)), max_size=4)):
        line += [flag, *draw(st.lists(VALUES, min_size=1, max_size=1))] if draw(st.booleans()) else [flag]
    if command in ("generate", "chat", "bench") and draw(st.booleans()):
        line += ["--address", NOBODY]
    return line


@pytest.fixture
def _nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def refuse(*arguments: object, **settings: object) -> None:
        raise FailedPrecondition("a process would have been started")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"typed\n")))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_line_ends_with_a_traceback(command: str) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(command_lines(command))
    def check(line: list[str]) -> None:
        status, printed = outcome(line)
        assert status in (0, 1, 2), (line, printed)
        if status:
            assert printed.strip(), line

    check()


def outcome(line: list[str]) -> tuple[int, str]:
    """The status, and what was printed. Whatever else is raised fails the test."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        status = main(line)
    return status, printed.getvalue()
