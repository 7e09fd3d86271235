"""The line about the machine says what a reader needs to compare figures."""

from __future__ import annotations

import platform

from loadtest.machine import describe_machine


def test_the_machine_is_one_line_with_cores_and_system() -> None:
    line = describe_machine()
    assert "core" in line
    assert platform.system() in line
    assert "\n" not in line
