"""Steps while sequences join and leave: the real scheduler and runner, with a small model and interpreted kernels."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks.churn import extend, life_for
from benchmarks.churn_traffic import Traffic
from benchmarks.random_model import random_decoder
from benchmarks.step_times import StepTimes
from benchmarks.tensor_parallel_engine import KERNELS, small_config
from common.worker.device_runner import DeviceRunner
from common.worker.step_plan import AddRow

BATCH = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    torch.set_num_threads(1)
    config = dataclasses.replace(small_config(rehearses=True), num_layers=1, windows=(None,), vocab_size=257)
    decoder = random_decoder(config, DEVICE, torch.float32, KERNELS)
    return Traffic(decoder, BATCH, context=70)


@pytest.fixture
def rows_seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the runner was told of rows."""
    seen: Counter[str] = Counter()
    add_row, remove_row = DeviceRunner.add_row, DeviceRunner.remove_row

    def add(self: DeviceRunner, message: AddRow) -> None:
        seen["added"] += 1
        add_row(self, message)

    def remove(self: DeviceRunner, row: int) -> None:
        seen["removed"] += 1
        remove_row(self, row)

    monkeypatch.setattr(DeviceRunner, "add_row", add)
    monkeypatch.setattr(DeviceRunner, "remove_row", remove)
    return seen


@pytest.mark.gpu
@pytest.mark.slow
def test_the_batch_stays_full_while_sequences_join_and_leave(traffic: Traffic, rows_seen: Counter[str]) -> None:
    times = traffic.churning(num_steps=12, life=8)
    assert times.num_rows == [BATCH] * 12
    assert 2 <= sum(times.num_joins) <= 12
    assert len(times.periods_ms) == len(times.gaps_ms) == len(times.num_joins) == 12
    assert rows_seen["added"] == rows_seen["removed"] >= BATCH + sum(times.num_joins)
    assert traffic.scheduler.kv_stats().num_held == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_without_churn_nobody_joins_or_leaves_while_steps_count(traffic: Traffic, rows_seen: Counter[str]) -> None:
    times = traffic.steady(num_steps=6, life=4)
    assert times.num_rows == [BATCH] * 8  # two lives of four steps each
    assert sum(times.num_joins) == 0
    assert rows_seen == {"added": 2 * BATCH, "removed": 2 * BATCH}


@pytest.mark.parametrize(("joins_per_s", "step_ms", "life"), [(64, 10, 100), (128, 10, 50), (1e6, 10, 8)])
def test_sequences_live_as_long_as_the_rate_of_joins_wants(joins_per_s: float, step_ms: float, life: int) -> None:
    assert life_for(joins_per_s, 64, step_ms) == life


def test_rounds_add_up() -> None:
    times = StepTimes([1.0], [0.5], [2], [0])
    extend(times, StepTimes([3.0], [0.25], [2], [1]))
    assert times == StepTimes([1.0, 3.0], [0.5, 0.25], [2, 2], [0, 1])
