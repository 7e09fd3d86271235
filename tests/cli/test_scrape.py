"""Reading metrics: what a sample is, what several processes are together, and quantiles between two scrapes."""

from __future__ import annotations

import asyncio
import math

import pytest
from prometheus_client import generate_latest

from cli.scrape import Scrape, quantile, scrape
from common.errors import Unavailable
from common.telemetry.histogram import Histogram
from common.telemetry.metrics import Metrics
from common.telemetry.metrics_server import MetricsServer
from services.router.metrics import RouterMetrics


def make_waits() -> tuple[Metrics, Histogram]:
    waits = Histogram("wait_seconds", "Waits.", (0.1, 0.2, 0.4))
    return Metrics("x_", {}, (waits,)), waits


def look(metrics: Metrics) -> Scrape:
    return Scrape.parse(generate_latest(metrics.registry).decode())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"\x00\x00\x06\x04\x00\x00\x00\x00\x00", "no metrics from"),  # as a gRPC server greets
        (b"", "no metrics from"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<p>hi</p>", "not with metrics"),
    ],
)
async def test_an_address_that_serves_something_else_is_named(answer: bytes, said: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
        with pytest.raises(Unavailable, match=f"{said}.*{url}|{url}.*{said}"):
            await scrape(url, timeout_s=20.0)
    with pytest.raises(Unavailable):
        await scrape("http://127.0.0.1:port/metrics", timeout_s=20.0)


async def test_a_scrape_has_every_sample_by_name_and_labels() -> None:
    metrics = RouterMetrics()
    metrics.inc("requests_ok", 3)
    metrics.inc("requests_Unavailable")
    server = MetricsServer(metrics, 0)
    await server.start()
    try:
        scraped = await scrape(f"http://127.0.0.1:{server.port}/metrics", timeout_s=5.0)
    finally:
        await server.stop()
    assert scraped.value("baton_router_requests_total", outcome="ok") == 3
    assert scraped.total("baton_router_requests_total") == 4
    with pytest.raises(KeyError):
        scraped.value("baton_router_requests_total")
    both = Scrape.merged([scraped, scraped])
    assert both.value("baton_router_requests_total", outcome="ok") == 6


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/metrics", "ftp://127.0.0.1/metrics", "http://", "nonsense"])
async def test_what_does_not_answer_is_unavailable(url: str) -> None:
    with pytest.raises(Unavailable, match=r"metrics|URL"):
        await scrape(url, timeout_s=2.0)


def test_quantiles_are_of_what_came_between_the_scrapes() -> None:
    metrics, waits = make_waits()
    waits.observe(5.0, n=1000)
    before = look(metrics)
    waits.observe(0.15, n=3)
    waits.observe(0.3, n=1)
    after = look(metrics)
    assert quantile(before, after, "x_wait_seconds", 0.75) == pytest.approx(0.2)
    assert quantile(before, after, "x_wait_seconds", 0.375) == pytest.approx(0.15)
    assert quantile(before, after, "x_wait_seconds", 1.0) == pytest.approx(0.4)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    metrics, waits = make_waits()
    before = look(metrics)
    waits.observe(70.0)
    assert quantile(before, look(metrics), "x_wait_seconds", 0.5) == 0.4
    assert math.inf in look(metrics).buckets("x_wait_seconds")


def test_there_is_no_quantile_of_nothing() -> None:
    metrics, waits = make_waits()
    waits.observe(0.1)
    scraped = look(metrics)
    assert quantile(scraped, scraped, "x_wait_seconds", 0.5) is None
    assert quantile(scraped, scraped, "x_other_seconds", 0.5) is None
