"""Counters: declared once, plain integers."""

from __future__ import annotations

import pytest

from common.telemetry.counters import Counters, CounterSpec, by_label


def test_counters_start_at_zero_and_add_up() -> None:
    counters = Counters({"steps": CounterSpec("steps", "Steps."), "tokens": CounterSpec("tokens", "Tokens.")})
    counters.inc("tokens")
    counters.inc("tokens", 4)
    assert counters.snapshot() == {"steps": 0, "tokens": 5}


def test_a_counter_that_was_not_declared_is_an_error() -> None:
    with pytest.raises(KeyError):
        Counters({"steps": CounterSpec("steps", "Steps.")}).inc("step")


def test_a_counter_cannot_go_back() -> None:
    with pytest.raises(AssertionError, match="steps"):
        Counters({"steps": CounterSpec("steps", "Steps.")}).inc("steps", -1)


def test_declaring_again_keeps_what_was_counted() -> None:
    counters = Counters(by_label("ends", "Ends.", "outcome", {"lost": "ends_lost"}))
    counters.inc("ends_lost", 2)
    counters.declare("ends_lost", CounterSpec("ends", "Ends.", (("outcome", "lost"),)))
    counters.declare("ends_found", CounterSpec("ends", "Ends.", (("outcome", "found"),)))
    assert counters.snapshot() == {"ends_lost": 2, "ends_found": 0}
