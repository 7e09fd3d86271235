"""All-reduce over mapped GPU memory; needs two GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_way_gives_the_exact_sum_in_replayed_graphs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.all_reduce", "--check"],
        capture_output=True,
        text=True,
        timeout=110.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "every way gives the exact sum" in done.stdout
