"""The line that a request leaves behind."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import datetime

import pytest

from common.telemetry.request_log import SAY_EVERY_S, RequestLog, SayNowAndThen, milliseconds


def test_a_line_is_json_with_the_request_and_its_outcome_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "baton.sample.request")
    RequestLog("sample").write('quo"te', "ok", total_ms=milliseconds(1_234_567), transport="ucx:tcp", detail=None)
    (record,) = caplog.records
    assert record.name == "baton.sample.request"
    fields = json.loads(record.getMessage())
    assert datetime.fromisoformat(fields.pop("time")).tzinfo is not None
    assert list(fields)[:3] == ["service", "request_id", "outcome"]
    assert fields == {
        "service": "sample",
        "request_id": 'quo"te',
        "outcome": "ok",
        "total_ms": 1.235,
        "transport": "ucx:tcp",
        "detail": None,
    }


def test_a_process_writes_requests_as_json_alone_and_all_else_as_text() -> None:
    script = (
        "import logging\n"
        "from common.telemetry.request_log import SAY_EVERY_S, RequestLog, SayNowAndThen, configure_logging\n"
        "configure_logging('INFO', 'sample')\n"
        "logging.getLogger('other').info('some text')\n"
        "RequestLog('sample').write('r1', 'ok')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    text, line = done.stderr.splitlines()
    assert text.endswith("other: some text")
    assert json.loads(line)["request_id"] == "r1"


def test_nothing_is_written_above_its_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "baton.sample.request")
    log = RequestLog("sample")
    assert not log.is_on
    log.write("request", "ok")
    assert not caplog.records


def test_what_strangers_can_bring_about_is_said_now_and_then_and_without_tracebacks() -> None:
    now_s = 100.0
    limit = SayNowAndThen(lambda: now_s)

    def say() -> str:
        try:
            raise ValueError("bytes")
        except ValueError:
            record = logging.LogRecord("grpc", logging.ERROR, "", 0, "odd %s", ("path",), sys.exc_info())
        return logging.Formatter("%(message)s").format(record) if limit.filter(record) else ""

    assert [say() for _ in range(4)] == ["odd path", "", "", ""]
    now_s += SAY_EVERY_S
    assert [say(), say()] == ["odd path (and 3 others)", ""]
