"""The runner of the GPU's tests deals out every test once, and hides no failure."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.gpu_suite import deal, start


@pytest.mark.parametrize("num_shares", [1, 3, 7, 20])
def test_every_test_is_dealt_out_once(num_shares: int) -> None:
    tests = [f"test {number}" for number in range(7)]
    shares = deal(tests, num_shares)
    assert sorted(test for share in shares for test in share) == tests
    assert len(shares) == min(num_shares, 7)


def test_a_failure_is_shown_in_full_and_what_passed_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'told so'\n"
        "def test_slow(): __import__('time').sleep(99)\n"
    )
    good, bad, slow = (start([f"{file}::{name}"], tmp_path / name) for name in ("test_good", "test_bad", "test_slow"))
    deadline_s = time.monotonic() + 60.0
    assert good.finish(deadline_s)
    assert capsys.readouterr().out.count("\n") == 1
    assert not bad.finish(deadline_s)
    assert "told so" in capsys.readouterr().out
    assert not slow.finish(time.monotonic())
    assert "NOT IN TIME: 1 tests" in capsys.readouterr().out
