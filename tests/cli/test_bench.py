"""`baton bench` as a user runs it: what it writes, how it stops, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from common.errors import ResourceExhausted
from loadtest.rate_search import Ending
from loadtest.report import json_report
from tests.loadtest import fake_inference, fake_openai
from tests.loadtest.fake_inference import FakeInference
from tests.loadtest.fake_openai import FakeOpenAI
from tests.loadtest.trace_files import row, write_trace

_BENCH = (sys.executable, "-m", "cli.main", "bench")


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


async def test_a_warm_up_of_which_nothing_came_ends_the_run() -> None:
    async with fake_openai.serving(FakeOpenAI(status=503)) as fake:
        args = ("--openai", fake.address, "--vocab-size", "900", "--constant", "100", "--requests", "3")
        status, output, errors = await _run(*args, "--warmup", "2")
    assert (status, output) == (1, "")
    assert "all 2 warm-up requests failed, the last with Unavailable: HTTP 503" in errors
    assert errors.count("\n") == 1
    assert len(fake.bodies) == 2, "no measured request was sent"


@pytest.mark.parametrize("fault", ["stalls", "dies"])
async def test_a_server_that_fails_in_the_middle_is_reported_and_a_failure(fault: str, tmp_path: Path) -> None:
    fake = FakeInference(num_before_end=1, num_good=6)
    async with fake_inference.serving(fake):
        args = ("--address", fake.address, "--constant", "40", "--requests", "24", "--output-tokens", "2")
        timeout = ("--timeout", "3" if fault == "stalls" else "20")
        process = await _start(*args, "--warmup", "0", *timeout, "--json", str(tmp_path / "run.json"))
        async with asyncio.timeout(60.0):
            for _ in range(6):
                await fake.served.get()
            await fake.stalled.wait()
        if fault == "dies":
            assert fake.server is not None
            await fake.server.stop(0.0)
        _, errors = await process.communicate()
    run = json_report.load(tmp_path / "run.json")
    failed = Counter(record.outcome for record in run.records if not record.is_ok)
    # A gRPC server that stops may still cancel what is in flight.
    assert failed.keys() <= (
        {"DeadlineExceeded"} if fault == "stalls" else {"ConnectionLost", "Unavailable", "Cancelled"}
    )
    assert process.returncode == 1
    assert 0 < failed.total() < len(run.records) == 24
    ((most, _),) = failed.most_common(1)
    # gRPC may have a line of its own to say of a connection that went away.
    last = errors.decode().splitlines()[-1]
    assert last == f"baton bench: {failed.total()} of 24 measured requests failed, most with {most}"


@pytest.mark.parametrize("num_warmup", [0, 2])
async def test_ctrl_c_stops_and_still_writes_the_report(num_warmup: int, tmp_path: Path) -> None:
    fake = FakeInference(num_before_end=2)
    async with fake_inference.serving(fake):
        args = ("--address", fake.address, "--poisson", "50", "--warmup", str(num_warmup), "--duration", "600")
        process = await _start(*args, "--output-tokens", "4", "--json", str(tmp_path / "run.json"))
        async with asyncio.timeout(60.0):
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


async def test_a_run_that_is_cut_short_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    fake = FakeInference(gap_s=0.001)
    async with fake_inference.serving(fake):
        args = ("--address", fake.address, "--constant", "20", "--duration", "60", "--warmup", "0")
        reports = ("--json", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html"))
        bench = await _start(*args, "--output-tokens", "2", *reports)
        async with asyncio.timeout(60.0):
            for _ in range(5):
                await fake.served.get()
        (client,) = psutil.Process(bench.pid).children()
        client.kill()
        output, errors = await bench.communicate()
    assert bench.returncode == 1
    assert errors.decode().startswith("baton bench: the run was cut short: InternalError: client process")
    assert errors.count(b"\n") == 1
    assert b"goodput" in output
    assert "cut short" in (tmp_path / "run.html").read_text(encoding="utf-8")
    run = json_report.load(tmp_path / "run.json")
    assert run.info.was_interrupted
    assert "(status -9)" in run.info.failure
    assert run.records


async def test_a_later_run_of_a_search_that_fails_does_not_lose_the_others(tmp_path: Path) -> None:
    fake = FakeInference()
    async with fake_inference.serving(fake):
        args = ("--address", fake.address, "--find-rate", "0.5", "--low-rate", "50", "--high-rate", "400")
        limits = ("--requests", "10", "--output-tokens", "2", "--warmup", "1", "--itl-limit", "5")
        reports = ("--json", str(tmp_path / "search.json"), "--html", str(tmp_path / "search.html"))
        process = await _start(*args, *limits, *reports)
        async with asyncio.timeout(60.0):
            for _ in range(11):
                await fake.served.get()
        fake.num_before_end, fake.error = 0, ResourceExhausted("full")
        output, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode() == (
        "baton bench: a run failed: Unavailable: all 1 warm-up requests failed, the last with ResourceExhausted: full\n"
    )
    search = json_report.load_search(tmp_path / "search.json")
    assert (search.ending, search.answer, len(search.probes)) == (Ending.FAILED, 50.0, 1)
    assert "ResourceExhausted" in search.failure
    assert "highest rate: 50 requests/s (a run failed" in " ".join(output.decode().split())
    assert "a run failed" in (tmp_path / "search.html").read_text(encoding="utf-8")


async def test_several_servers_get_the_same_load_one_after_the_other(tmp_path: Path) -> None:
    router, other = FakeInference(), FakeOpenAI()
    async with fake_inference.serving(router), fake_openai.serving(other):
        status, output, errors = await _run(
            "--address", router.address, "--openai", other.address, "--vocab-size", "900", "--seed", "4",
            "--poisson", "100", "--requests", "8", "--output-tokens", "3", "--warmup", "1",
            "--json", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html"),
        )  # fmt: skip
    assert (status, errors) == (0, "")
    assert output.count("8 ok") == 2
    assert "comparison" in output
    assert sorted(path.name for path in _files_in(tmp_path)) == ["run.1.json", "run.2.json", "run.html"]
    runs = [json_report.load(tmp_path / f"run.{number}.json") for number in (1, 2)]
    assert [run.info.case for run in runs] == [router.address, other.address]
    assert [run.info.kind for run in runs] == ["baton", "openai"]
    assert [r.due_s for r in runs[0].records if not r.is_warmup] == [
        r.due_s for r in runs[1].records if not r.is_warmup
    ]
    prompts = sorted(tuple(request.token_ids.ids) for request in router.requests)
    assert prompts == sorted(tuple(body["prompt"]) for body in other.bodies)
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert all(f"{run.info.case}, " in page for run in runs)


async def test_a_server_that_fails_before_its_run_does_not_lose_the_others(tmp_path: Path) -> None:
    router, other = FakeInference(), FakeOpenAI(status=503)
    async with fake_inference.serving(router), fake_openai.serving(other):
        status, output, errors = await _run(
            "--address", router.address, "--openai", other.address, "--vocab-size", "900", "--constant", "100",
            "--requests", "4", "--output-tokens", "2", "--warmup", "1", "--json", str(tmp_path / "run.json"),
        )  # fmt: skip
    assert status == 1
    assert f"baton bench: {other.address}: Unavailable: all 1 warm-up requests failed" in errors
    assert "4 ok" in output
    assert [path.name for path in _files_in(tmp_path)] == ["run.1.json"]


async def test_a_row_too_long_for_the_model_is_named_unless_it_is_clipped(tmp_path: Path) -> None:
    path = write_trace(tmp_path, row(0, 100, [0]), row(10, 600, [0, 1]))
    async with fake_inference.serving(FakeInference()) as fake:
        status, _, errors = await _run("--address", fake.address, "--trace", str(path), "--warmup", "0")
        assert status == 2
        assert "trace.jsonl, row 1" in errors
        assert not fake.requests
        status, output, _ = await _run("--address", fake.address, "--trace", str(path), "--warmup", "0", "--clip")
        assert status == 0
        assert "1 of 2 requests clipped to the context of 512 tokens" in " ".join(output.split())
    first, second = sorted(tuple(request.token_ids.ids) for request in fake.requests)
    assert {len(first), len(second)} == {100, 510}
    assert first[:100] == second[:100]
