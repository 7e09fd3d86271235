"""A program with a terminal of its own: what is typed there, and what is seen."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
from collections.abc import AsyncIterator

import psutil  # type: ignore[import-untyped]

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """What a person sees and does."""

    def __init__(self, terminal: int, process: asyncio.subprocess.Process) -> None:
        self._terminal = terminal
        self._process = process
        self._seen = b""
        self._grown = asyncio.Event()
        asyncio.get_running_loop().add_reader(terminal, self._read)

    @property
    def text(self) -> str:
        """All that was shown since the last `type`, without the codes that move the cursor."""
        return _ESCAPES.sub("", self._seen.decode(errors="replace")).replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        """Press keys; what was seen before is forgotten. `\\x03` is Ctrl-C."""
        self._seen = b""
        os.write(self._terminal, keys.encode())

    async def until(self, text: str) -> str:
        """Wait until this is seen, and return all that is."""
        while text not in self.text:
            self._grown.clear()
            await self._grown.wait()
        return self.text

    async def prompt(self, text: str) -> None:
        """Wait until this is seen and a line is waited for: Python finds a signal between the two with the next key."""
        await self.until(text)
        process = psutil.Process(self._process.pid)
        while True:
            if process.status() == psutil.STATUS_SLEEPING:
                return
            await asyncio.sleep(0.01)  # the kernel tells nobody

    async def ended(self) -> int:
        """The exit status."""
        return await self._process.wait()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._terminal)
        os.close(self._terminal)

    def _read(self) -> None:
        try:
            self._seen += os.read(self._terminal, 1 << 16)
        except OSError:  # the other end is closed
            asyncio.get_running_loop().remove_reader(self._terminal)
        self._grown.set()


@contextlib.asynccontextmanager
async def in_terminal(*command: str, patience_s: float = 60.0) -> AsyncIterator[Terminal]:
    """Run it, for so long at most."""
    outer, inner = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *("setsid", "--ctty", "--wait", *command),
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(inner)
    terminal = Terminal(outer, process)
    try:
        async with asyncio.timeout(patience_s):
            yield terminal
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        terminal.close()
