"""Lanes: known ones have a series from the start, others from their first chunk; the last one taken is marked."""

from __future__ import annotations

from common.telemetry.counters import Counters
from common.telemetry.lanes import KNOWN_LANES, LaneUse, lane_counters


def test_known_lanes_are_there_and_none_is_taken() -> None:
    counters = Counters(lane_counters())
    assert LaneUse(counters).levels == dict.fromkeys(KNOWN_LANES, 0.0)
    assert set(counters.snapshot().values()) == {0}


def test_the_lane_taken_last_is_marked_and_chunks_are_counted_by_lane() -> None:
    counters = Counters(lane_counters())
    lanes = LaneUse(counters)
    for lane in ("ucx:cuda_ipc", "ucx:cuda_ipc", "ucx:tcp"):
        lanes.count(lane)
    assert {lane for lane, level in lanes.levels.items() if level} == {"ucx:tcp"}
    snapshot = counters.snapshot()
    assert (snapshot["chunks_by_lane:ucx:cuda_ipc"], snapshot["chunks_by_lane:ucx:tcp"]) == (2, 1)


def test_a_lane_that_nobody_knew_gets_a_series() -> None:
    counters = Counters(lane_counters())
    lanes = LaneUse(counters)
    lanes.count("ucx:sysv,ucx:tcp")
    lanes.count("ucx:tcp")
    assert lanes.levels["ucx:sysv,ucx:tcp"] == 0.0
    assert counters.snapshot()["chunks_by_lane:ucx:sysv,ucx:tcp"] == 1
    assert counters.specs["chunks_by_lane:ucx:sysv,ucx:tcp"].labels == (("lane", "ucx:sysv,ucx:tcp"),)
