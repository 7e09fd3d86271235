"""How a rank ended, in words."""

from __future__ import annotations

import pytest

from common.worker.rank_exit import described_exit, telling_line


@pytest.mark.parametrize(
    ("return_code", "tail", "expected"),
    [
        (0, b"", "ended with status 0"),
        (3, b"out of memory\n", "ended with status 3, saying: out of memory"),
        (-9, b"", "was ended by SIGKILL"),
        (-200, b"", "was ended by signal 200"),
        (None, b"", "closed its channels and does not end"),
    ],
)
def test_an_exit_is_described(return_code: int | None, tail: bytes, expected: str) -> None:
    assert described_exit(return_code, tail) == expected


@pytest.mark.parametrize("return_code", [-6, -11, -7])
def test_what_strangers_can_bring_about_is_named(return_code: int) -> None:
    assert "stray bytes" in described_exit(return_code, b"")


@pytest.mark.parametrize(
    ("tail", "line"),
    [
        (b"", ""),
        (b"====\n\n----\n", ""),
        (b"starting\nready\n", "ready"),
        (b"ready\n x.c:1 Assertion `a' failed\n==== backtrace ====\n 0 lib.so\n====\n", "x.c:1 Assertion `a' failed"),
        (b"\xff\xfe Fatal: y\nz\n", "\ufffd\ufffd Fatal: y"),
    ],
)
def test_the_line_that_tells_is_found_before_the_stack(tail: bytes, line: str) -> None:
    assert telling_line(tail) == line


def test_a_line_without_end_is_cut() -> None:
    assert len(telling_line(b"error " + b"x" * 5000)) == 300
