"""How a rank process ended, in words, from its exit status and the last that it wrote. Pure."""

from __future__ import annotations

import re
import signal
from typing import Final

_MAX_SAID_CHARS: Final = 300
_TELLING: Final = re.compile(r"assert|fatal|caught signal|error|exception", re.IGNORECASE)
_STRAY_BYTES: Final = frozenset({signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS})


def described_exit(return_code: int | None, stderr_tail: bytes) -> str:
    """`return_code` as `subprocess` has it; None: the process has not ended."""
    if return_code is None:
        return "closed its channels and does not end"
    how = f"ended with status {return_code}" if return_code >= 0 else f"was ended by {_name(-return_code)}"
    said = telling_line(stderr_tail)
    if said:
        how += f", saying: {said}"
    if -return_code in _STRAY_BYTES:
        how += " (stray bytes on its KV port can do that: keep strangers away from it)"
    return how


def telling_line(stderr_tail: bytes) -> str:
    """The first of the last lines that names an error, else the last one. Libraries print stacks behind their words."""
    lines = [line.strip() for line in stderr_tail.decode(errors="replace").splitlines()]
    lines = [line for line in lines if any(char.isalnum() for char in line)]
    telling = next((line for line in lines if _TELLING.search(line)), lines[-1] if lines else "")
    return telling if len(telling) <= _MAX_SAID_CHARS else telling[: _MAX_SAID_CHARS - 1] + "…"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
