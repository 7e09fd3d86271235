"""The rate of the last transfers."""

from __future__ import annotations

from common.telemetry.recent_rate import RecentRate


def test_there_is_no_rate_before_the_first_transfer() -> None:
    assert RecentRate().bytes_per_s == 0.0


def test_it_is_bytes_over_the_time_that_transfers_took() -> None:
    rate = RecentRate()
    rate.add(1_000, 1_000_000)
    rate.add(3_000, 1_000_000)
    assert rate.bytes_per_s == 2_000_000


def test_old_transfers_are_forgotten() -> None:
    rate = RecentRate(num_transfers=2)
    for num_bytes in (10**9, 100, 100):
        rate.add(num_bytes, 1_000)
    assert rate.bytes_per_s == 100_000_000
