"""The samples that a scrape of a service must have: those that its metrics declare, whatever has happened."""

from __future__ import annotations

from baton.v1 import worker_pb2
from prometheus_client import generate_latest

from cli.scrape import Labels, Scrape
from common.telemetry.metrics import Metrics
from common.worker.worker_metrics import WorkerMetrics
from services.router.metrics import RouterMetrics


def scrape_of(metrics: Metrics) -> Scrape:
    """As if a service with an empty status had been scraped."""
    return Scrape.parse(text_of(metrics))


def text_of(metrics: Metrics) -> str:
    """What such a service would answer."""
    if isinstance(metrics, WorkerMetrics):
        metrics.watch(worker_pb2.WorkerStatus)
    elif isinstance(metrics, RouterMetrics):
        levels = {"sequences_in_flight": 0.0, "requests_waiting": 0.0, "outputs_unread": 0.0}
        metrics.watch(lambda: {**levels, "workers_ready": {"prefill": 0.0, "decode": 0.0}})
    return generate_latest(metrics.registry).decode()


def declared_samples(metrics: Metrics) -> set[tuple[str, Labels]]:
    """Names and labels."""
    return set(scrape_of(metrics).samples)
