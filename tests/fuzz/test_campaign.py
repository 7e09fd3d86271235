"""Anything is sent to a deployment: its processes go on, answer at once, and give right outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.campaign import fuzz


@pytest.mark.slow
async def test_a_deployment_bears_whatever_is_sent_to_it(shipped_model: Path) -> None:
    outcome = await fuzz(shipped_model, range(2000), seed=20261130, per_round=500, log_dir=None)
    assert outcome.faults == []
    assert outcome.num_valid == 5
    kinds = {kind.split()[1] for kind in outcome.num_inputs}
    assert kinds == {"calls", "grpc", "http", "other"}
