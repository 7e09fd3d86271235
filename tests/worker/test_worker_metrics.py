"""Gauges that are read from a worker's status, and what both kinds of workers count alike."""

from __future__ import annotations

import pytest
from baton.v1 import kv_pb2, worker_pb2

from common.telemetry.counters import CounterSpec
from common.worker.worker_metrics import WorkerMetrics, reject_reason


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics("baton_test_", {"steps": CounterSpec("steps", "Steps.")})


def test_gauges_follow_the_status(metrics: WorkerMetrics) -> None:
    status = worker_pb2.WorkerStatus(
        state=worker_pb2.WORKER_STATE_READY,
        num_waiting=1,
        num_running=2,
        num_waiting_tokens=3,
        num_blocks_free=4,
        num_blocks_cached=5,
        num_blocks_held=6,
        num_slots_free=7,
        num_slots_in_use=8,
        num_slots_quarantined=9,
        num_grants_waiting=10,
    )
    metrics.watch(lambda: status)
    read = metrics.registry.get_sample_value
    plain = ("ready", "requests_waiting", "requests_running", "waiting_tokens", "grants_waiting")
    assert [read(f"baton_test_{name}") for name in plain] == [1, 1, 2, 3, 10]
    assert [read("baton_test_blocks", {"state": state}) for state in ("free", "cached", "held")] == [4, 5, 6]
    assert [read("baton_test_slots", {"state": state}) for state in ("free", "in_use", "quarantined")] == [7, 8, 9]
    status.state = worker_pb2.WORKER_STATE_DRAINING
    assert read("baton_test_ready") == 0


def test_a_transfer_shows_in_duration_and_rate(metrics: WorkerMetrics) -> None:
    metrics.watch(worker_pb2.WorkerStatus)
    metrics.transferred(1_000, 10_000)
    read = metrics.registry.get_sample_value
    assert read("baton_test_transfer_rate_bytes_per_second") == 100_000_000
    assert read("baton_test_transfer_duration_seconds_sum") == pytest.approx(1e-5)


def test_a_reason_that_nobody_knows_makes_no_new_name() -> None:
    assert reject_reason(kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH) == "digest_mismatch"
    assert reject_reason(kv_pb2.ChunkRejectReason.ValueType(77)) == "unspecified"
