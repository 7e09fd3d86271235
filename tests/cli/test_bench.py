"""`baton bench` as a user runs it: what it writes, how it stops, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cli.bench_options import workload_from
from cli.main import build_parser, main
from loadtest.report import json_report
from tests.loadtest import fake_inference, fake_openai
from tests.loadtest.fake_inference import FakeInference
from tests.loadtest.fake_openai import FakeOpenAI

_BENCH = (sys.executable, "-m", "cli.main", "bench")
_NOBODY = ("--address", "127.0.0.1:9")


async def _start(*args: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*_BENCH, *args, stdout=pipe, stderr=pipe, start_new_session=True)


async def _run(*args: str) -> tuple[int, str, str]:
    process = await _start(*args)
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def _files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def _trace(directory: Path, *rows: dict[str, object]) -> Path:
    path = directory / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _row(timestamp: int, prompt: int, ids: list[int]) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": prompt, "output_length": 2, "hash_ids": ids}


async def test_a_run_prints_and_writes_its_reports(tmp_path: Path) -> None:
    async with fake_inference.serving(FakeInference()) as fake:
        status, output, errors = await _run(
            "--address", fake.address, "--poisson", "100", "--requests", "20", "--output-tokens", "3", "--seed", "4",
            "--ttft-limit", "1", "--itl-limit", "0.5", "--worker", fake.address,
            "--json", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html"),
        )  # fmt: skip
    assert (status, errors) == (0, "")
    assert "20 ok" in output
    run = json_report.load(tmp_path / "run.json")
    assert (run.info.seed, run.info.target, run.info.model) == (4, fake.address, "fake")
    assert run.info.workload == "Poisson, 100 requests/s; prompts of 128 tokens, outputs of 3"
    assert sum(record.is_warmup for record in run.records) == 8
    assert run.info.command.startswith("baton bench --address")
    assert "<html" in (tmp_path / "run.html").read_text(encoding="utf-8")


async def test_a_run_that_nothing_came_of_has_a_status_of_its_own() -> None:
    async with fake_openai.serving(FakeOpenAI(status=503)) as fake:
        args = ("--openai", fake.address, "--vocab-size", "900", "--constant", "100", "--requests", "3")
        status, output, _ = await _run(*args)
    assert status == 1
    assert "Unavailable" in output


@pytest.mark.parametrize("num_warmup", [0, 2])
async def test_ctrl_c_stops_and_still_writes_the_report(num_warmup: int, tmp_path: Path) -> None:
    fake = FakeInference(num_before_end=2)
    async with fake_inference.serving(fake):
        args = ("--address", fake.address, "--poisson", "50", "--warmup", str(num_warmup), "--duration", "600")
        process = await _start(*args, "--output-tokens", "4", "--json", str(tmp_path / "run.json"))
        async with asyncio.timeout(20.0):
            await fake.stalled.wait()
            # As a terminal does it: to every process of the group.
            os.killpg(process.pid, signal.SIGINT)
            _, errors = await process.communicate()
    assert process.returncode == 130
    assert errors == b""
    run = json_report.load(tmp_path / "run.json")
    assert run.info.was_interrupted
    assert {(record.outcome, record.is_warmup) for record in run.records} == {("Interrupted", num_warmup > 0)}


async def test_a_search_varies_the_prompts_and_reports_the_highest_rate(tmp_path: Path) -> None:
    async with fake_inference.serving(FakeInference()) as fake:
        status, output, errors = await _run(
            "--address", fake.address, "--find-rate", "0.5", "--low-rate", "50", "--high-rate", "100",
            "--requests", "10", "--output-tokens", "2", "--warmup", "0", "--itl-limit", "5",
            "--json", str(tmp_path / "search.json"), "--html", str(tmp_path / "search.html"),
        )  # fmt: skip
    assert (status, errors) == (0, "")
    search = json_report.load_search(tmp_path / "search.json")
    assert search.answer == 100.0
    assert [probe.rate for probe in search.probes] == [50.0, 100.0]
    prompts = {tuple(request.token_ids.ids) for request in fake.requests}
    assert len(prompts) == 20
    assert "100 requests/s" in output


async def test_what_cannot_be_written_after_all_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with fake_inference.serving(FakeInference()) as fake:
        args = ("--address", fake.address, "--constant", "100", "--requests", "3", "--output-tokens", "2")
        status, _, errors = await _run(*args, "--html", "/dev/full")
    assert status == 1
    (kept,) = _files_in(tmp_path)
    assert kept.name.startswith("baton-bench-")
    assert str(kept) in errors
    assert errors.count("\n") == 1
    assert sum(not record.is_warmup for record in json_report.load(kept).records) == 3


async def test_what_was_measured_is_kept_when_a_client_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    fake = FakeInference(gap_s=0.001)
    async with fake_inference.serving(fake):
        args = ("--address", fake.address, "--constant", "20", "--duration", "60", "--warmup", "0")
        bench = await _start(*args, "--output-tokens", "2")
        async with asyncio.timeout(20.0):
            for _ in range(5):
                await fake.served.get()
        (client,) = psutil.Process(bench.pid).children()
        client.kill()
        _, errors = await bench.communicate()
    assert bench.returncode == 1
    (kept,) = _files_in(tmp_path)
    assert f"status -9); what was measured is kept in {kept}" in errors.decode()
    run = json_report.load(kept)
    assert run.info.was_interrupted
    assert run.records


async def test_a_row_too_long_for_the_model_is_named_unless_it_is_clipped(tmp_path: Path) -> None:
    path = _trace(tmp_path, _row(0, 100, [0]), _row(10, 600, [0, 1]))
    async with fake_inference.serving(FakeInference()) as fake:
        status, _, errors = await _run("--address", fake.address, "--trace", str(path), "--warmup", "0")
        assert status == 1
        assert "trace.jsonl, row 1" in errors
        assert not fake.requests
        status, output, _ = await _run("--address", fake.address, "--trace", str(path), "--warmup", "0", "--clip")
        assert status == 0
        assert "1 of 2 requests clipped to the context of 512 tokens" in " ".join(output.split())
    first, second = sorted(tuple(request.token_ids.ids) for request in fake.requests)
    assert {len(first), len(second)} == {100, 510}
    assert first[:100] == second[:100]


def test_only_the_rows_that_are_used_are_named(tmp_path: Path) -> None:
    path = _trace(tmp_path, *(_row(index, 100, [index]) for index in range(9)))
    parser = build_parser()
    flags = ["bench", "--lengths-from", str(path), "--first-row", "2", "--requests", "4", "--poisson", "1"]
    assert workload_from(parser.parse_args(flags)).describe().endswith("trace.jsonl, rows 2-5, shared prefixes kept")
    everything = workload_from(parser.parse_args(["bench", "--trace", str(path)]))
    assert everything.describe().endswith("trace.jsonl, rows 0-8, shared prefixes kept")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--poisson", "4"), "Unavailable"),
        (("--poisson", "-4"), "rate = -4.0"),
        ((), "--poisson"),
        (("--gamma", "4"), "--cv"),
        (("--poisson", "4", "--cv", "2"), "--cv"),
        (("--poisson", "4", "--rate-scale", "2"), "--rate-scale"),
        (("--poisson", "4", "--length-scale", "2"), "--length-scale"),
        (("--poisson", "4", "--rows", "2"), "--rows"),
        (("--poisson", "4", "--input-tokens", "x"), "--input-tokens"),
        (("--poisson", "4", "--requests", "0"), "requests = 0"),
        (("--poisson", "4", "--seed", "-1"), "--seed"),
        (("--poisson", "4", "--vocab-size", "9"), "--vocab-size"),
        (("--poisson", "4", "--openai", "http://127.0.0.1:9"), "--vocab-size"),
        (("--poisson", "4", "--openai", "127.0.0.1:9", "--vocab-size", "900"), "--openai"),
        (("--poisson", "4", "--itl-limit", "0"), "itl_s"),
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
    assert main(["bench", *_NOBODY, *args]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("baton bench: ")
    assert named in errors


def test_a_malformed_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _trace(tmp_path, _row(0, 100, [0]), _row(10, 600, [0]))
    assert main(["bench", *_NOBODY, "--trace", str(path)]) == 1
    assert "trace.jsonl, line 2, hash_ids" in capsys.readouterr().err


def test_checking_a_path_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    old.write_text("as it was", encoding="utf-8")
    assert main(["bench", *_NOBODY, "--poisson", "1", "--json", str(old), "--html", str(tmp_path / "new.html")]) == 1
    assert "Unavailable" in capsys.readouterr().err
    assert _files_in(tmp_path) == [old]
    assert old.read_text(encoding="utf-8") == "as it was"
