"""What a value on the command line may be: types for argparse, whose complaint names value and limit. Pure."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

from common.config import split_address

_MAX_SHOWN_CHARS = 40


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""
    limit = f"a whole number from {low} to {high}" if high is not None else f"a whole number, at least {low}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise _wrong(text, limit) from error
        if value < low or (high is not None and value > high):
            raise _wrong(text, limit)
        return value

    return parse


def number(low: float, high: float | None = None, *, above: bool = False) -> Callable[[str], float]:
    """A finite number from `low`, or only above it, to `high`."""
    limit = f"a number {'above' if above else 'from'} {low:g}" + ("" if high is None else f" to {high:g}")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise _wrong(text, limit) from error
        if not math.isfinite(value) or value < low or (above and value == low) or (high is not None and value > high):
            raise _wrong(text, limit)
        return value

    return parse


def host_port(text: str) -> str:
    """`host:port`."""
    try:
        split_address(text)
    except ValueError as error:
        raise _wrong(text, "host:port, with a port of at most 65535") from error
    return text


def host(text: str) -> str:
    """A name or an address."""
    if not re.fullmatch(r"[A-Za-z0-9._:-]+", text):
        raise _wrong(text, "the name or address of a host")
    return text


port = whole(0, 65535)
seconds = number(0, 86_400, above=True)


def _wrong(text: str, limit: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."
    return argparse.ArgumentTypeError(f"{shown!r} is not {limit}")
