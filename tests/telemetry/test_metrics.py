"""What Prometheus sees of a service's metrics."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import generate_latest

from common.telemetry.counters import SECONDS_PER_NS, CounterSpec, by_label
from common.telemetry.histogram import Histogram
from common.telemetry.metrics import GaugeSpec, Level, Metrics


def make_metrics() -> tuple[Metrics, Histogram]:
    counters = {
        "steps": CounterSpec("steps", "Steps computed."),
        "idle_ns": CounterSpec("idle_seconds", "Idle.", (), SECONDS_PER_NS),
        **by_label("ends", "Ends.", "outcome", {"ok": "ends_ok", "lost": "ends_lost"}),
    }
    waits = Histogram("wait_seconds", "Waits.", (0.1, 1.0))
    return Metrics("baton_test_", counters, (waits,)), waits


def lines_of(metrics: Metrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_everything_is_there_before_anything_happened() -> None:
    metrics, _ = make_metrics()
    levels: dict[str, Level] = {"running": 0.0, "blocks": {"free": 4.0, "held": 0.0}}
    specs = {"running": GaugeSpec("Running."), "blocks": GaugeSpec("Blocks.", "state")}
    metrics.set_gauges(specs, lambda: levels)
    assert {line for line in lines_of(metrics) if not line.startswith("#")} == {
        "baton_test_steps_total 0.0",
        "baton_test_idle_seconds_total 0.0",
        'baton_test_ends_total{outcome="ok"} 0.0',
        'baton_test_ends_total{outcome="lost"} 0.0',
        'baton_test_wait_seconds_bucket{le="0.1"} 0.0',
        'baton_test_wait_seconds_bucket{le="1.0"} 0.0',
        'baton_test_wait_seconds_bucket{le="+Inf"} 0.0',
        "baton_test_wait_seconds_count 0.0",
        "baton_test_wait_seconds_sum 0.0",
        "baton_test_running 0.0",
        'baton_test_blocks{state="free"} 4.0',
        'baton_test_blocks{state="held"} 0.0',
    }


def test_counters_histograms_and_help_are_exported_in_base_units() -> None:
    metrics, waits = make_metrics()
    metrics.inc("steps", 2)
    metrics.inc("idle_ns", 1_500_000_000)
    metrics.inc("ends_lost")
    waits.observe(0.5)
    lines = lines_of(metrics)
    assert "# HELP baton_test_steps_total Steps computed." in lines
    assert "baton_test_steps_total 2.0" in lines
    assert "baton_test_idle_seconds_total 1.5" in lines
    assert 'baton_test_ends_total{outcome="lost"} 1.0' in lines
    assert 'baton_test_wait_seconds_bucket{le="1.0"} 1.0' in lines
    assert lines.count("# TYPE baton_test_ends_total counter") == 1


def test_status_and_scrape_read_the_same_number() -> None:
    metrics, _ = make_metrics()
    metrics.inc("ends_ok", 3)
    assert metrics.snapshot()["ends_ok"] == 3
    assert metrics.registry.get_sample_value("baton_test_ends_total", {"outcome": "ok"}) == 3


def test_a_scrape_survives_counters_that_are_declared_meanwhile() -> None:
    metrics, _ = make_metrics()
    done = threading.Event()
    failures: list[BaseException] = []

    def scrape() -> None:
        try:
            while not done.is_set():
                list(metrics.collect())
        except BaseException as error:
            failures.append(error)

    scraping = threading.Thread(target=scrape)
    scraping.start()
    for number in range(3000):
        metrics.declare(f"lane_{number}", CounterSpec("lanes", "Lanes.", (("lane", str(number)),)))
        metrics.inc(f"lane_{number}")
    done.set()
    scraping.join()
    assert not failures


def test_a_gauge_that_is_not_read_is_an_error() -> None:
    metrics, _ = make_metrics()
    metrics.set_gauges({"running": GaugeSpec("Running.")}, dict)
    with pytest.raises(KeyError):
        list(metrics.collect())
