"""Which lanes the KV bytes of a worker take: a series for each, and for the last hand-off which it was.

A fall-back from NVLink to TCP costs most of the speed and is no error, so it must be seen. Knows no transport.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.telemetry.counters import Counters, CounterSpec

KNOWN_LANES = ("ucx:tcp", "ucx:cuda_ipc", "ucx:rc_mlx5", "nccl")  # others are added when they are seen
COUNTER_PREFIX = "chunks_by_lane:"  # then the lane: the counter's name in a worker's status
FAMILY = "lane_chunks"
HELP = "Chunks whose bytes took this lane."


def lane_counters() -> dict[str, CounterSpec]:
    """Those of the lanes that are known."""
    return {COUNTER_PREFIX + lane: _spec(lane) for lane in KNOWN_LANES}


class LaneUse:
    """Counts chunks by lane."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._levels = dict.fromkeys(KNOWN_LANES, 0.0)

    def count(self, lane: str) -> None:
        """One chunk took this lane. Several ranks may take several, as `ucx:tcp,ucx:cuda_ipc`."""
        if self._levels.get(lane) != 1.0:
            self._counters.declare(COUNTER_PREFIX + lane, _spec(lane))
            self._levels = dict.fromkeys(self._levels, 0.0) | {lane: 1.0}
        self._counters.inc(COUNTER_PREFIX + lane)

    @property
    def levels(self) -> Mapping[str, float]:
        """By lane, 1 for the last one that was taken. May be read on any thread."""
        return self._levels


def _spec(lane: str) -> CounterSpec:
    return CounterSpec(FAMILY, HELP, (("lane", lane),))
