"""Metrics over HTTP: what is asked for is answered, and who connects and says nothing costs nobody anything."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator

import aiohttp
import pytest

from common.errors import FailedPrecondition
from common.telemetry import metrics_server
from common.telemetry.counters import CounterSpec
from common.telemetry.metrics import Metrics
from common.telemetry.metrics_server import MAX_CONNECTIONS, MetricsServer
from common.worker.worker_config import WorkerConfig
from services.decode.config import DecodeConfig
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig

NUM_IDLE = 1500


def make_metrics() -> Metrics:
    metrics = Metrics("baton_test_", {"steps": CounterSpec("steps", "Steps computed.")}, ())
    metrics.inc("steps", 2)
    return metrics


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    server = MetricsServer(make_metrics(), 0)
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop()


async def scrape(port: int, path: str = "/metrics", accept: str = "*/*") -> tuple[int, str, str]:
    url = f"http://127.0.0.1:{port}{path}"
    async with (
        aiohttp.ClientSession(headers={"Accept": accept}) as session,
        asyncio.timeout(20),
        session.get(url) as response,
    ):
        return response.status, response.content_type, await response.text()


@pytest.mark.parametrize("path", ["/metrics", "/", "/metrics?name=x"])
async def test_a_scrape_is_answered(path: str) -> None:
    async with serving() as port:
        for _ in range(2):
            status, content_type, text = await scrape(port, path)
            assert (status, content_type) == (200, "text/plain")
            assert "baton_test_steps_total 2.0" in text.splitlines()


async def test_open_metrics_is_spoken_to_who_asks_for_it() -> None:
    async with serving() as port:
        _, content_type, text = await scrape(port, accept="application/openmetrics-text; version=1.0.0")
    assert content_type == "application/openmetrics-text"
    assert text.splitlines()[-1] == "# EOF"


async def test_other_paths_and_methods_are_refused() -> None:
    async with serving() as port:
        assert (await scrape(port, "/other"))[0] == 404
        async with aiohttp.ClientSession() as session, session.post(f"http://127.0.0.1:{port}/metrics") as response:
            assert response.status == 405


async def test_idle_connections_take_no_thread_and_no_place() -> None:
    num_threads = threading.active_count()
    async with serving() as port:
        idle: list[asyncio.StreamWriter] = []
        for _ in range(NUM_IDLE // 10):
            idle += [writer for _, writer in await asyncio.gather(*[_connect(port) for _ in range(10)])]
            if len(idle) == 10 * MAX_CONNECTIONS:
                assert (await scrape(port))[0] == 200
            for writer in idle[: -2 * MAX_CONNECTIONS]:
                writer.close()
            del idle[: -2 * MAX_CONNECTIONS]
        assert threading.active_count() == num_threads
        assert (await scrape(port))[0] == 200
        for writer in idle:
            writer.close()
        assert (await scrape(port))[0] == 200


async def _connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_TIMEOUT_S", 0.05)
    async with serving() as port:
        reader, writer = await _connect(port)
        writer.write(b"GET /metrics HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_a_head_without_end_is_cut_off() -> None:
    async with serving() as port:
        reader, writer = await _connect(port)
        writer.write(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (64 << 10))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_stopping_waits_for_nobody() -> None:
    server = MetricsServer(make_metrics(), 0)
    await server.start()
    _, writer = await _connect(server.port)
    await scrape(server.port)
    await asyncio.wait_for(server.stop(), 20)
    writer.close()


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FailedPrecondition, match=str(port)):
            await MetricsServer(make_metrics(), port).start()


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig.model_validate({"model": "m", "decode": ("a:1",)}),
        PrefillConfig.model_validate({"model": "m"}),
        DecodeConfig.model_validate({"model": "m"}),
    ],
    ids=["router", "prefill", "decode"],
)
def test_nothing_listens_for_other_machines_unless_told_to(config: RouterConfig | WorkerConfig) -> None:
    assert config.listen.startswith("127.0.0.1:")
    assert config.metrics_address == "127.0.0.1"
    elsewhere = type(config).model_validate(config.model_dump() | {"listen": "10.0.0.1:1"})
    assert elsewhere.metrics_address == "10.0.0.1"
    assert type(config).model_validate(elsewhere.model_dump() | {"metrics_host": "::1"}).metrics_address == "::1"
