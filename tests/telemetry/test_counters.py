"""Counters and what Prometheus sees of them."""

from __future__ import annotations

import urllib.request

import pytest

from common.telemetry.counters import Counters, MetricsServer


def test_counters_start_at_zero_and_add_up() -> None:
    counters = Counters({"steps": "Steps.", "tokens": "Tokens."})
    counters.inc("tokens")
    counters.inc("tokens", 4)
    assert counters.snapshot() == {"steps": 0, "tokens": 5}


def test_a_counter_that_was_not_declared_is_an_error() -> None:
    with pytest.raises(KeyError):
        Counters({"steps": "Steps."}).inc("step")


def test_prometheus_sees_counters_and_gauges() -> None:
    counters = Counters({"steps": "Steps computed."})
    counters.set_gauges(lambda: {"num_running": 3.0})
    counters.inc("steps", 2)
    server = MetricsServer(counters, port=0, host="127.0.0.1")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5.0) as response:
            lines = response.read().decode().splitlines()
    finally:
        server.stop()
    assert "baton_steps_total 2.0" in lines
    assert "baton_num_running 3.0" in lines
    assert "# HELP baton_steps_total Steps computed." in lines
