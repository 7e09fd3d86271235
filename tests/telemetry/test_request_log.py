"""The line that a request leaves behind."""

from __future__ import annotations

import json
import logging

import pytest

from common.telemetry.request_log import RequestLog, milliseconds


def test_a_line_is_json_with_the_request_and_its_outcome_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "baton.sample.request")
    RequestLog("sample").write('quo"te', "ok", total_ms=milliseconds(1_234_567), transport="ucx:tcp", detail=None)
    (record,) = caplog.records
    assert record.name == "baton.sample.request"
    fields = json.loads(record.getMessage())
    assert list(fields)[:2] == ["request_id", "outcome"]
    assert fields == {
        "request_id": 'quo"te',
        "outcome": "ok",
        "total_ms": 1.235,
        "transport": "ucx:tcp",
        "detail": None,
    }


def test_nothing_is_written_above_its_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "baton.sample.request")
    log = RequestLog("sample")
    assert not log.is_on
    log.write("request", "ok")
    assert not caplog.records
