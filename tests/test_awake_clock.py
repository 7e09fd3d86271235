"""Time of a process's own: pauses do not count."""

from __future__ import annotations

from common.awake_clock import TICK_S, AwakeClock


def test_it_goes_with_the_time_while_its_owner_runs() -> None:
    clock = AwakeClock(100.0)
    for index in range(1, 41):
        clock.tick(100.0 + index * TICK_S)
    assert clock.now_s == 40 * TICK_S


def test_a_pause_of_its_owner_is_two_ticks_at_most_and_it_never_goes_back() -> None:
    clock = AwakeClock(100.0)
    assert clock.tick(3700.0) == 2 * TICK_S
    assert clock.tick(200.0) == 2 * TICK_S
    assert clock.tick(200.0 + TICK_S) == 3 * TICK_S
