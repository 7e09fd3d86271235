"""Link speed: the bytes of the last seconds, whatever came before, across restarts."""

from __future__ import annotations

from baton.v1 import worker_pb2

from cli.link_speed import LinkSpeed, lane_of
from services.decode.metrics import COUNTERS as DECODE_COUNTERS
from services.prefill.metrics import COUNTERS as PREFILL_COUNTERS


def status(num_bytes: int, incarnation: str = "a") -> worker_pb2.WorkerStatus:
    return worker_pb2.WorkerStatus(incarnation=incarnation, counters={"bytes_shipped": num_bytes})


def test_the_counters_that_it_reads_exist() -> None:
    assert "bytes_shipped" in PREFILL_COUNTERS
    assert "bytes_verified" in DECODE_COUNTERS
    assert "bytes_shipped" not in DECODE_COUNTERS, "it would be counted twice"


def test_speed_is_of_the_window_and_falls_to_nothing_without_news() -> None:
    link = LinkSpeed(window_s=5.0)
    link.add(status(1_000_000), 0.0)
    assert link.bytes_per_s(0.1) is None, "a moment says nothing"
    link.add(status(1_000_400), 2.0)
    assert link.bytes_per_s(2.0) == 200
    assert link.bytes_per_s(4.0) == 100
    assert link.bytes_per_s(8.0) == 0
    link.add(status(1_001_400), 9.0)
    assert link.bytes_per_s(10.0) == 200


def test_a_worker_that_restarts_counts_from_zero() -> None:
    link = LinkSpeed()
    link.add(status(10**9), 0.0)
    link.add(status(0, "b"), 1.0)
    assert link.bytes_per_s(1.5) == 0
    link.add(status(500, "b"), 2.0)
    assert link.bytes_per_s(2.0) == 500


def test_the_lane_is_that_of_most_chunks() -> None:
    counters = {"chunks_by_lane:ucx:tcp": 2, "chunks_by_lane:ucx:cuda_ipc": 9, "chunks_by_lane:nccl": 0, "steps": 99}
    assert lane_of(worker_pb2.WorkerStatus(counters=counters)) == "ucx:cuda_ipc"
    assert lane_of(worker_pb2.WorkerStatus(counters={"chunks_by_lane:nccl": 0})) == ""
