"""What the flags of `baton bench` describe, and how one that is wrong is named before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.bench_options import workload_from
from cli.main import build_parser, main
from tests.loadtest.trace_files import row, write_trace

_NOBODY = ("--address", "127.0.0.1:9")


def test_only_the_rows_that_are_used_are_named(tmp_path: Path) -> None:
    path = write_trace(tmp_path, *(row(index, 100, [index]) for index in range(9)))
    parser = build_parser()
    flags = ["bench", "--lengths-from", str(path), "--first-row", "2", "--requests", "4", "--poisson", "1"]
    assert workload_from(parser.parse_args(flags)).describe().endswith("trace.jsonl, rows 2-5, shared prefixes kept")
    everything = workload_from(parser.parse_args(["bench", "--trace", str(path)]))
    assert everything.describe().endswith("trace.jsonl, rows 0-8, shared prefixes kept")


def test_without_flags_it_is_a_closed_loop_of_a_hundred_requests() -> None:
    workload = workload_from(build_parser().parse_args(["bench"]))
    assert workload.concurrency == 8
    assert workload.num_requests == 100


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--poisson", "4"), "Unavailable"),
        (("--poisson", "-4"), "--poisson"),
        ((), "Unavailable"),
        (("--gamma", "4"), "--cv"),
        (("--poisson", "4", "--cv", "2"), "--cv"),
        (("--poisson", "4", "--rate-scale", "2"), "--rate-scale"),
        (("--poisson", "4", "--length-scale", "2"), "--length-scale"),
        (("--poisson", "4", "--rows", "2"), "--rows"),
        (("--poisson", "4", "--input-tokens", "x"), "--input-tokens"),
        (("--poisson", "4", "--requests", "0"), "--requests"),
        (("--poisson", "4", "--seed", "-1"), "--seed"),
        (("--poisson", "4", "--vocab-size", "9"), "--vocab-size"),
        (("--poisson", "4", "--openai", "http://127.0.0.1:9"), "--vocab-size"),
        (("--poisson", "4", "--address", "127.0.0.1:10", "--worker", "127.0.0.1:11"), "--worker"),
        (("--find-rate", "0.9", "--itl-limit", "1", "--address", "127.0.0.1:10"), "--find-rate"),
        (("--poisson", "4", "--openai", "127.0.0.1:9", "--vocab-size", "900"), "--openai"),
        (("--poisson", "4", "--itl-limit", "0"), "--itl-limit"),
        (("--find-rate", "0.9"), "--itl-limit"),
        (("--trace", "missing.jsonl"), "missing.jsonl"),
        (("--trace", "missing.parquet"), "trace format"),
        (("--trace", "a.csv", "--lengths-from", "b.csv"), "--lengths-from"),
        (("--poisson", "4", "--json", "/nowhere/at/all.json"), "--json"),
        (("--poisson", "4", "--html", "/"), "--html"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *_NOBODY, *args]) == (1 if named == "Unavailable" else 2)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("baton bench: ")
    assert named in errors


def test_a_malformed_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path, row(0, 100, [0]), row(10, 600, [0]))
    assert main(["bench", *_NOBODY, "--trace", str(path)]) == 2
    assert "trace.jsonl, line 2, hash_ids" in capsys.readouterr().err


def test_checking_a_path_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    old.write_text("as it was", encoding="utf-8")
    assert main(["bench", *_NOBODY, "--poisson", "1", "--json", str(old), "--html", str(tmp_path / "new.html")]) == 1
    assert "Unavailable" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text(encoding="utf-8") == "as it was"
