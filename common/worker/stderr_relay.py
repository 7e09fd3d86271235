"""Passes on what a child process writes to its standard error, and keeps the end of it. Knows no meaning of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Final

KEPT_BYTES: Final = 8192
_STDERR_FD: Final = 2


class StderrRelay:
    """`run` until the child, and whoever has its standard error too, are gone. `tail`: the last bytes."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self.tail = b""

    async def run(self) -> None:
        while chunk := await self._stream.read(1 << 16):
            self.tail = (self.tail + chunk)[-KEPT_BYTES:]
            with contextlib.suppress(OSError):  # ours is closed: nobody reads
                _write_all(chunk)


def _write_all(chunk: bytes) -> None:
    while chunk:
        chunk = chunk[os.write(_STDERR_FD, chunk) :]
