"""Everything that one service measures, as Prometheus scrapes it: counters, histograms, and gauges that are read then.

All series exist from the start, at zero: a rate over a counter that appears with its first event misses that event. A
scrape only reads. Knows no service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

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
        """Export what `read` returns for each of `specs`. It is called by each scrape: it must only look."""
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


def _gauge_family(name: str, spec: GaugeSpec, level: Level) -> GaugeMetricFamily:
    if not isinstance(level, Mapping):
        return GaugeMetricFamily(name, spec.help, value=level)
    family = GaugeMetricFamily(name, spec.help, labels=[spec.label])
    for label_value, value in level.items():
        family.add_metric([label_value], value)
    return family
