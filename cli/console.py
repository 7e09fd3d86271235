"""The terminal as every command draws on it: what comes from flags, models and servers is text and never markup."""

from __future__ import annotations

from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error."""
    return Console(stderr=stderr, markup=False, emoji=False)
