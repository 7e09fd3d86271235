"""Everything that one service measures, as Prometheus scrapes it: counters, histograms, and gauges that are read then.

All series exist from the start, at zero: a rate over a counter that appears with its first event misses that event. The
scraping thread only reads. Knows no service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from common.errors import FailedPrecondition
from common.telemetry.counters import Counters, CounterSpec
from common.telemetry.histogram import Histogram

Level = float | Mapping[str, float]  # of a gauge with a label: by the label's value


@dataclass(frozen=True, slots=True)
class GaugeSpec:
    """What a gauge says. With `label` it is one series for each value that is read."""

    help: str
    label: str = ""


class Metrics(Counters, Collector):
    """What a service counts, with the prefix of its names: in Prometheus `steps` of `baton_decode_` is
    `baton_decode_steps_total`. Each service derives its own, with its histograms as attributes."""

    def __init__(self, prefix: str, counters: Mapping[str, CounterSpec], histograms: Sequence[Histogram]) -> None:
        super().__init__(counters)
        self.prefix = prefix
        self._histograms = histograms
        self._gauges: Mapping[str, GaugeSpec] = {}
        self._read_gauges: Callable[[], Mapping[str, Level]] = dict
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def set_gauges(self, specs: Mapping[str, GaugeSpec], read: Callable[[], Mapping[str, Level]]) -> None:
        """Export what `read` returns for each of `specs`. It is called on the scraping thread: it must only look."""
        self._gauges = specs
        self._read_gauges = read

    def collect(self) -> Iterator[Metric]:
        yield from self._counter_families()
        for histogram in self._histograms:
            buckets = histogram.cumulative()
            yield HistogramMetricFamily(self.prefix + histogram.name, histogram.help, buckets, histogram.sum)
        levels = self._read_gauges()
        for name, spec in self._gauges.items():
            yield _gauge_family(self.prefix + name, spec, levels[name])

    def _counter_families(self) -> list[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for name, value in self.snapshot().items():
            spec = self.specs[name]
            family = families.get(spec.family)
            if family is None:
                labels = [label for label, _ in spec.labels]
                family = families[spec.family] = CounterMetricFamily(
                    self.prefix + spec.family, spec.help, labels=labels
                )
            family.add_metric([label_value for _, label_value in spec.labels], value * spec.scale)
        return list(families.values())


class MetricsServer:
    """Serves `/metrics` over HTTP on a thread of its own until `stop`. Raises `FailedPrecondition` if it cannot."""

    def __init__(self, metrics: Metrics, port: int, host: str = "0.0.0.0") -> None:
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise FailedPrecondition(f"cannot serve metrics on {host}:{port}: {error}") from error

    @property
    def port(self) -> int:
        """The port in use (the kernel's choice if 0 was asked for)."""
        return self._server.server_port

    def stop(self) -> None:
        """Close the port and join the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _gauge_family(name: str, spec: GaugeSpec, level: Level) -> GaugeMetricFamily:
    if not isinstance(level, Mapping):
        return GaugeMetricFamily(name, spec.help, value=level)
    family = GaugeMetricFamily(name, spec.help, labels=[spec.label])
    for label_value, value in level.items():
        family.add_metric([label_value], value)
    return family
