"""Every metric of every service keeps Prometheus's conventions: prefix, base units, `_total`, help, labels, buckets."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from baton.v1 import kv_pb2
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from common import errors
from common.telemetry.metrics import Metrics
from services.decode.chunk_transfer import OUTCOMES as CANCEL_OUTCOMES
from services.decode.metrics import DecodeMetrics
from services.decode.request import End
from services.prefill.metrics import PrefillMetrics
from services.router.metrics import OUTCOMES, RouterMetrics
from tests.telemetry.declared import text_of

SERVICES: dict[str, type[Metrics]] = {"router": RouterMetrics, "prefill": PrefillMetrics, "decode": DecodeMetrics}
# Words for a unit that is no base unit, or for a type, which have no place in a name.
FORBIDDEN_WORDS = {
    "ms", "us", "ns", "milliseconds", "microseconds", "nanoseconds", "minutes", "kib", "mib", "gib", "kb", "mb", "gb",
    "count", "sum", "bucket", "counter", "gauge", "histogram", "num", "time", "percent",
}  # fmt: skip
DURATION_WORDS = {"wait", "duration", "gap", "idle", "token_seconds"}
HISTOGRAM_UNITS = ("_seconds", "_tokens", "_rows", "_bytes")


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def families_of(service: str) -> list[Metric]:
    metrics = SERVICES[service]()  # type: ignore[call-arg]
    return list(text_string_to_metric_families(text_of(metrics)))


def test_names_have_the_services_prefix_and_no_word_that_prometheus_adds_or_forbids(service: str) -> None:
    for family in families_of(service):
        assert re.fullmatch(rf"baton_{service}_[a-z][a-z0-9]*(_[a-z0-9]+)*", family.name), family.name
        words = set(family.name.split("_"))
        if family.name.endswith("time_to_first_token_seconds"):  # the field's name for it
            words -= {"time"}
        assert not words & FORBIDDEN_WORDS, family.name
        assert "total" not in words, f"{family.name}: the type adds it"


def test_durations_are_seconds_and_histograms_name_their_unit(service: str) -> None:
    for family in families_of(service):
        words = set(family.name.split("_"))
        if words & DURATION_WORDS:
            assert family.name.endswith("_seconds"), family.name
        if family.type == "histogram":
            assert family.name.endswith(HISTOGRAM_UNITS), family.name
        if "bytes" in words:
            assert family.name.endswith(("_bytes", "_bytes_per_second")), family.name


def test_help_is_one_sentence(service: str) -> None:
    for family in families_of(service):
        assert re.fullmatch(r"[A-Z0-9].*\.", family.documentation), f"{family.name}: {family.documentation!r}"
        assert len(family.documentation) <= 120, family.name


def test_types_are_told_and_no_series_comes_twice(service: str) -> None:
    for family in families_of(service):
        assert family.type in {"counter", "gauge", "histogram"}, family.name
        assert family.samples, f"{family.name} has no series before the first event"
        series = Counter((sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples)
        assert set(series.values()) == {1}, family.name
        labels = {tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples}
        assert len(labels) == 1, f"{family.name}: its series have different labels"


def test_labels_have_every_value_that_is_known() -> None:
    reasons = {name.removeprefix("CHUNK_REJECT_REASON_").lower() for name in dict(kv_pb2.ChunkRejectReason.items())}
    assert _values("decode", "sequences_ended", "outcome") == {end.value for end in End}
    assert _values("decode", "cancelled_receives", "outcome") == set(CANCEL_OUTCOMES)
    assert _values("decode", "chunks_rejected", "reason") == reasons
    assert _values("prefill", "chunks_rejected", "reason") == reasons
    assert _values("prefill", "lane_info", "lane") == _values("prefill", "lane_chunks", "lane")
    for role in ("prefill", "decode"):
        assert _values(role, "blocks", "state") == {"free", "cached", "held"}
        assert _values(role, "slots", "state") == {"free", "in_use", "quarantined"}


def test_the_router_knows_every_error_of_the_tree_as_an_outcome() -> None:
    tree = [name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, Exception)]
    assert sorted(OUTCOMES) == sorted(["ok", *tree])


def test_series_are_few(service: str) -> None:
    """A scrape is text, made while requests run."""
    assert sum(len(family.samples) for family in families_of(service)) < 300


def _values(service: str, name: str, label: str) -> set[str]:
    (family,) = (family for family in families_of(service) if family.name == f"baton_{service}_{name}")
    return {sample.labels[label] for sample in family.samples}
