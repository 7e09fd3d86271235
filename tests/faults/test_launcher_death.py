"""`baton up` killed with SIGKILL: what runs is finished, and no process outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from baton.v1 import inference_pb2

from cli.client import connect
from tests.integration.requests import greedy_request

NUM_TOKENS = 400
NUM_THREADS = 6  # as many as grpc has after a while: the kernel tells a child of its parent's death once for each


@pytest.mark.parametrize("router_processes", [1, 2])
async def test_a_running_output_is_finished_when_the_launcher_is_killed(router_processes: int, tmp_path: Path) -> None:
    async with _up("--router-processes", str(router_processes), "--log-dir", str(tmp_path)) as (launcher, address):
        family = psutil.Process(launcher.pid).children(recursive=True)
        tokens: list[int] = []
        async with connect(address) as client:
            finish = inference_pb2.GenerateResponse()
            async for response in client.generate(greedy_request([7, 8, 9], NUM_TOKENS), timeout_s=60.0):
                if not tokens:
                    launcher.kill()
                tokens.extend(response.token_ids)
                finish = response
            assert finish.HasField("usage"), "the stream was cut"
        assert len(tokens) == NUM_TOKENS
        _, alive = psutil.wait_procs(family, timeout=40.0)
        assert not alive


@contextlib.asynccontextmanager
async def _up(*flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A launcher with threads, as one has that watches workers for a while, and where its router listens."""
    code = (
        "import sys, threading, time; from cli.main import main\n"
        f"[threading.Thread(target=time.sleep, args=(600,), daemon=True).start() for _ in range({NUM_THREADS})]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    launcher = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "up", "--port", "0", *flags, stdout=asyncio.subprocess.PIPE
    )
    family: list[psutil.Process] = []
    try:
        assert launcher.stdout is not None
        address = ""
        async with asyncio.timeout(60.0):
            while not address:
                line = (await launcher.stdout.readline()).decode()
                assert line, "baton up ended before it was ready"
                if line.startswith("ready:"):
                    address = line.split("--address ")[1].split()[0]
        family = psutil.Process(launcher.pid).children(recursive=True)
        yield launcher, address
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            launcher.kill()
        await launcher.communicate()
