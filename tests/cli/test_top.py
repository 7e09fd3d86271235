"""`baton top`: what it shows of workers and of a router, once and for as long as it is watched."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from baton.v1 import worker_pb2, worker_pb2_grpc

from cli.main import main
from common.rpc.server import RpcServer
from common.telemetry.metrics_server import MetricsServer
from common.worker.status_service import SERVICE_NAME, StatusService
from services.router.metrics import RouterMetrics

TOP = (sys.executable, "-m", "cli.main", "top")
ENVIRONMENT = {**os.environ, "COLUMNS": "180", "LINES": "40", "TERM": "xterm"}
PATIENCE_S = 60.0


class Worker:
    """A status that can be changed, on a port of its own."""

    def __init__(self, name: str, role: worker_pb2.WorkerRole.ValueType, **fields: object) -> None:
        self.status = worker_pb2.WorkerStatus(
            worker_id=name,
            role=role,
            state=worker_pb2.WORKER_STATE_READY,
            incarnation="1",
            **fields,  # type: ignore[arg-type]
        )
        self.service = StatusService(self._build, lambda: None)
        self.address = ""

    def _build(self) -> worker_pb2.WorkerStatus:
        status = worker_pb2.WorkerStatus()
        status.CopyFrom(self.status)
        return status

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Worker]:
        server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
        server.add(worker_pb2_grpc.add_WorkerServicer_to_server, self.service, SERVICE_NAME)
        self.address = f"127.0.0.1:{await server.start()}"
        try:
            yield self
        finally:
            self.service.close()
            await server.stop(0.0)


async def top(*args: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *TOP, *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=ENVIRONMENT
    )
    async with asyncio.timeout(PATIENCE_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


async def test_once_shows_workers_and_the_routers_latencies() -> None:
    metrics = RouterMetrics()
    metrics.watch(
        lambda: {"sequences_in_flight": 0, "requests_waiting": 0, "outputs_unread": 0, "workers_ready": {"prefill": 1}}
    )
    metrics.inc("requests_ok", 4)
    metrics.inc("output_tokens", 40)
    metrics.first_token.observe(0.045, n=4)
    router = MetricsServer(metrics, 0)
    await router.start()
    lanes = {"chunks_by_lane:ucx:tcp": 7}
    prefill = Worker("prefill-a", worker_pb2.WORKER_ROLE_PREFILL, num_blocks_free=10, counters=lanes, num_waiting=6)
    decode = Worker("decode-a", worker_pb2.WORKER_ROLE_DECODE, num_running=13, num_blocks_held=30, num_blocks_cached=10)
    try:
        async with prefill.serving(), decode.serving():
            url = f"http://127.0.0.1:{router.port}/metrics"
            where = ("--prefill", prefill.address, "--decode", decode.address, "--router-metrics", url)
            status, text = await top("--once", *where)
    finally:
        await router.stop()
    assert status == 0, text
    assert all(word in line_of(text, "prefill-a") for word in ("prefill", "ready", "10/0/0", "ucx:tcp", " 6 "))
    assert all(word in line_of(text, "decode-a") for word in ("decode", "13", "0/10/30", "███████████████▒▒▒▒▒"))
    assert "4 requests, 40 tokens" in text
    assert "40 ms" in line_of(text, "time to first token")
    assert "–" in line_of(text, "inter-token latency")


async def test_once_fails_if_somebody_is_not_there() -> None:
    worker = Worker("decode-a", worker_pb2.WORKER_ROLE_DECODE)
    async with worker.serving():
        status, text = await top("--once", "--decode", f"{worker.address},127.0.0.1:9")
        assert status == 1
        assert "unreachable" in line_of(text, "127.0.0.1:9")
        assert "ready" in line_of(text, "decode-a")
        status, text = await top("--once", "--decode", worker.address, "--router-metrics", "http://127.0.0.1:9/metrics")
        assert status == 1
        assert "router: no metrics from" in text


async def test_it_follows_changes_until_q_is_pressed() -> None:
    worker = Worker("decode-a", worker_pb2.WORKER_ROLE_DECODE, num_running=1)
    terminal, inner = pty.openpty()
    async with worker.serving():
        arguments = (*TOP, "--decode", worker.address, "--interval", "0.2")
        process = await asyncio.create_subprocess_exec(
            *arguments, stdin=inner, stdout=inner, stderr=inner, env=ENVIRONMENT, start_new_session=True
        )
        os.close(inner)
        seen = Screen(terminal)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await seen.until("decode-a")
                worker.status.num_running = 4711
                worker.service.notify()
                await seen.until("4711")
                os.write(terminal, b"xq")
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            seen.close()


class Screen:
    """What a terminal was sent."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._text = b""
        self._grown = asyncio.Event()
        asyncio.get_running_loop().add_reader(terminal, self._read)

    async def until(self, text: str) -> None:
        while text.encode() not in self._text:
            self._grown.clear()
            await self._grown.wait()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._terminal)
        os.close(self._terminal)

    def _read(self) -> None:
        try:
            self._text += os.read(self._terminal, 1 << 16)
        except OSError:  # the other end is closed
            asyncio.get_running_loop().remove_reader(self._terminal)
        self._grown.set()


@pytest.mark.parametrize(
    "arguments", [[], ["--prefill", " , "], ["--decode", "a"], ["--decode", "a:1", "--interval", "0"]]
)
def test_wrong_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert " --" in errors
