"""Each run has a file of its own, and what cannot be written where it was wanted is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.bench_reports import HTML_FLAG, JSON_FLAG, Report, numbered, write_reports
from common.errors import FailedPrecondition


def _write(content: str, path: Path) -> None:
    path.write_text(content, encoding="utf-8")


def _report(flag: str, path: Path | None, content: str) -> Report:
    return Report(flag, path, lambda where: _write(content, where))


def test_the_number_comes_before_the_suffix_if_there_are_several() -> None:
    assert numbered(Path("a/run.json"), 1) == [Path("a/run.json")]
    assert numbered(Path("a/run.json"), 2) == [Path("a/run.1.json"), Path("a/run.2.json")]
    assert numbered(Path("run"), 2) == [Path("run.1"), Path("run.2")]
    assert numbered(None, 2) == [None, None]


def test_what_was_asked_for_is_written(tmp_path: Path) -> None:
    write_reports([_report(JSON_FLAG, tmp_path / "a", "one"), _report(HTML_FLAG, None, "two")])
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["one"]


def test_one_that_fails_keeps_none_of_the_others_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reports = [
        _report(JSON_FLAG, Path("/dev/full"), "one"),
        _report(JSON_FLAG, tmp_path / "two.json", "two"),
        _report(HTML_FLAG, tmp_path / "page.html", "page"),
    ]
    with pytest.raises(FailedPrecondition) as refused:
        write_reports(reports)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "page"
    (kept,) = tmp_path.glob("baton-bench-*.json")
    assert kept.read_text(encoding="utf-8") == "one"
    assert str(refused.value).endswith(f"what was measured is kept in {kept}, {tmp_path / 'two.json'}")
