"""The progress bar shows where a run is, on a terminal only."""

from __future__ import annotations

import asyncio
import time

import pytest

from cli.bench_progress import shown_progress
from loadtest.generator import Observed
from loadtest.record import RequestRecord


def _record(outcome: str, is_warmup: bool = False) -> RequestRecord:
    return RequestRecord(
        index=0,
        due_s=0.0,
        sent_s=0.0,
        ended_s=1.0,
        num_prompt_tokens=8,
        max_tokens=4,
        arrivals=(),
        outcome=outcome,
        is_warmup=is_warmup,
    )


async def _drawn(observed: Observed, capsys: pytest.CaptureFixture[str]) -> str:
    async with shown_progress(observed, "load test", 60.0):
        await asyncio.sleep(0)  # the bar is drawn at once, and then from time to time
    return capsys.readouterr().err


@pytest.fixture
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("_terminal")
async def test_warm_up_and_run_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    observed = Observed(num_planned=5)
    observed.add(_record("ok", is_warmup=True))
    assert "load test: warm-up" in await _drawn(observed, capsys)
    observed.started_s = time.monotonic()
    observed.add(_record("ok"))
    observed.add(_record("Unavailable"))
    assert "2 ended, 1 failed" in await _drawn(observed, capsys)


@pytest.mark.usefixtures("_terminal")
async def test_a_run_that_only_the_clock_ends_shows_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    observed = Observed(started_s=time.monotonic() - 30.0)
    assert "0 ended, 0 failed" in await _drawn(observed, capsys)


async def test_nothing_is_drawn_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert await _drawn(Observed(), capsys) == ""
