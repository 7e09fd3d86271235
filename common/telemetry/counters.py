"""Counters of one process: named once with a description, counted by anybody, read by status and by Prometheus.

A name that was not declared is an error, so that a counter cannot be lost to a typo. Knows no service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "baton_"


class Counters(Collector):
    """Monotonic counters, and gauges that are read when somebody scrapes.

    In Prometheus the counter `steps` is `baton_steps_total`, the gauge `num_running` is `baton_num_running`.
    """

    def __init__(self, descriptions: Mapping[str, str]) -> None:
        self._descriptions = dict(descriptions)
        self._values = dict.fromkeys(descriptions, 0)
        self._read_gauges: Callable[[], Mapping[str, float]] = dict
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def inc(self, name: str, n: int = 1) -> None:
        """Add to a declared counter."""
        assert n >= 0, f"counter {name} cannot go back"
        self._values[name] += n

    def snapshot(self) -> dict[str, int]:
        """Every counter by name, zeros included."""
        return dict(self._values)

    def set_gauges(self, read: Callable[[], Mapping[str, float]]) -> None:
        """Export what `read` returns. It is called on the scraping thread: it must only look."""
        self._read_gauges = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self.snapshot().items():
            yield CounterMetricFamily(PREFIX + name, self._descriptions[name], value=value)
        for name, level in self._read_gauges().items():
            yield GaugeMetricFamily(PREFIX + name, name.replace("_", " "), value=level)


class MetricsServer:
    """Serves `/metrics` over HTTP on a thread of its own until `stop`."""

    def __init__(self, counters: Counters, port: int, host: str = "0.0.0.0") -> None:
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(port, addr=host, registry=counters.registry)

    @property
    def port(self) -> int:
        """The port in use (the kernel's choice if 0 was asked for)."""
        return self._server.server_port

    def stop(self) -> None:
        """Close the port and join the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
