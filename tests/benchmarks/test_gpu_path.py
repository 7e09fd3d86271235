"""What the benchmarks of the whole path say of their timings, and that one of them really sends nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.goodput import SHIPPED
from benchmarks.gpu_path import P99_FROM, Timing, figures, print_figures, topologies_to_check
from benchmarks.gpu_path_check import PAIRINGS, Topology, check_rounding, deployed
from benchmarks.prefill_slowdown import Prefilled, compare, measure


def timing(exposed_ms: float) -> Timing:
    return Timing(
        ttft_s=0.055, prefill_s=0.050, exposed_s=exposed_ms / 1e3, second_gap_s=0.007, step_s=0.005, transport="ucx:tcp"
    )


def test_a_p99_is_given_of_enough_requests_only() -> None:
    few = figures([timing(float(ms)) for ms in range(1, P99_FROM)])
    assert few["hand-off exposed max"] == pytest.approx(99)
    assert "hand-off exposed p99" not in few
    enough = figures([timing(float(ms)) for ms in range(1, P99_FROM + 1)])
    assert enough["hand-off exposed p99"] == pytest.approx(99)
    assert enough["hand-off exposed max"] == pytest.approx(100)
    assert enough["hand-off exposed p50"] == pytest.approx(50.5)
    assert enough["TTFT beyond it p50"] == pytest.approx(5)
    assert enough["second token late by p99"] == pytest.approx(2)


def test_each_length_has_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures({64: figures([timing(1.0)]), 128: figures([timing(2.0)])}, "ucx:tcp", 1)
    said = capsys.readouterr().out
    assert "| | 64 tokens | 128 tokens |" in said
    assert "| hand-off exposed max | 1.00 | 2.00 |" in said


def test_the_slowdown_is_that_of_medians() -> None:
    sent = [Prefilled(prefill_ms, prefill_ms - 1, 2_000_000) for prefill_ms in (103.0, 102.0, 500.0)]
    kept = [Prefilled(prefill_ms, prefill_ms, 0) for prefill_ms in (100.0, 100.0, 100.0, 104.0)]
    found = compare(sent, kept)
    assert found["slowdown"] == pytest.approx(0.03)
    assert found["device_slowdown"] == pytest.approx(0.02)
    assert found["control"] == pytest.approx(0.02)
    assert found["sent_mb"] == 2.0


@pytest.mark.slow
async def test_prompts_are_sent_and_kept_by_turns(tmp_path: Path) -> None:
    args = argparse.Namespace(device="cpu", repeats=2, tokens=200)
    sent, kept = await measure(args, tmp_path)
    assert len(sent) == len(kept) == 2
    assert all(one.bytes_shipped > 1_000_000 for one in sent)
    assert all(one.bytes_shipped == 0 for one in kept)
    assert all(0 < one.steps_ms <= one.prefill_ms for one in (*sent, *kept))


def test_the_topology_that_was_asked_for_is_checked_alone() -> None:
    asked = Topology(num_prefill=2, decode_tp=2)
    assert asked.num_devices == 4
    assert topologies_to_check(asked, 4) == [asked]
    assert topologies_to_check(Topology(), 3) == [pairing for pairing in PAIRINGS if pairing != Topology(1, 2, 1, 2)]


@pytest.mark.slow
async def test_two_prefill_workers_hand_off_what_two_decode_ranks_would_compute(tmp_path: Path) -> None:
    log_dir = tmp_path / "path"
    spec = Topology(num_prefill=2, decode_tp=2).spec(SHIPPED, "cpu", ("--dtype", "float32"), log_dir)
    async with deployed(spec) as (deployment, client):
        found = await check_rounding(deployment, client, SHIPPED, log_dir, tolerance=1e-3)
    assert {name: (one.num_equal, one.num_outputs) for name, one in found.items()} == {
        "alone and all at once": (16, 16),
        "with and without a hand-off": (16, 16),
        "reused blocks of a hand-off and none": (14, 14),
    }
