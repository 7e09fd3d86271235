"""What is written is read back as it was; other files are refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import InvalidArgument
from loadtest.goodput import Limits
from loadtest.rate_search import Ending, RateSearch, find_rate
from loadtest.record import Run
from loadtest.report import json_report
from tests.loadtest.sample_runs import ODD_RUNS, random_run

LIMITS = Limits(0.5, (0.02, 0.05))


async def a_search() -> RateSearch:
    async def measure(rate: float) -> Run:
        return random_run(rate, num_requests=30)

    return await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, low_rate=1, high_rate=64, max_runs=4)


@pytest.mark.parametrize("run", [random_run(4.0), *ODD_RUNS.values()], ids=["random", *ODD_RUNS])
def test_a_run_is_read_back_as_it_was(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    json_report.write(run, LIMITS, path)
    assert json_report.load(path) == run
    assert json_report.load_limits(path) == LIMITS


async def test_a_search_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    search = await a_search()
    json_report.write_search(search, LIMITS, path)
    assert json_report.load_search(path) == search
    assert json_report.load_limits(path) == LIMITS


async def test_why_a_search_failed_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    search = replace(await a_search(), ending=Ending.FAILED, failure="Unavailable: gone")
    json_report.write_search(search, LIMITS, path)
    assert json_report.load_search(path) == search


def test_the_documented_keys_are_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    json_report.write(random_run(4.0), LIMITS, path)
    report = json.loads(path.read_bytes())
    assert list(report) == ["schema_version", "report", "info", "limits", "records", "samples", "summary", "goodput"]
    assert (report["schema_version"], report["report"]) == (1, "run")
    assert report["limits"] == {"ttft_s": 0.5, "itl_s": [0.02, 0.05]}
    assert list(report["summary"]["ttft"]) == ["num_values", "mean_s", "p50_s", "p90_s", "p99_s", "max_s"]
    assert report["summary"]["errors"][0]["outcome"] == "ResourceExhausted"
    assert [row["variant"] for row in report["goodput"]] == ["every-gap", "p99-gap", "mean-TPOT"] * 2
    assert {"index", "due_s", "sent_s", "ended_s", "arrivals", "outcome", "is_warmup"} <= set(report["records"][0])


def test_files_with_keys_of_a_later_time_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run = random_run(4.0)
    json_report.write(run, LIMITS, path)
    report = json.loads(path.read_bytes())
    report["new"] = report["info"]["new"] = report["records"][0]["new"] = 1
    report["summary"] = {"of": "another shape"}
    path.write_text(json.dumps(report))
    assert json_report.load(path) == run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a report of a load test"),
        (b"\xff\xfe", "not a report of a load test"),
        (b'{"schema_version": "1"}', "not a report of a load test"),
        (b'{"schema_version": 99, "report": "run", "limits": {"ttft_s": null, "itl_s": []}}', "schema_version = 99"),
        (b'{"schema_version": 1, "report": "search", "limits": {"ttft_s": null, "itl_s": []}}', "no report of a run"),
        (b'{"schema_version": 1, "report": "run", "limits": {"ttft_s": null, "itl_s": []}}', "was changed"),
        (b'{"schema_version": 1, "report": "run", "limits": {"ttft_s": -1, "itl_s": []}}', "ttft_s = -1"),
    ],
)
def test_other_files_are_refused_with_the_reason(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        json_report.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere\.json"):
        json_report.load(tmp_path / "nowhere.json")
