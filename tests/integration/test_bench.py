"""`baton bench` as a user runs it, against a real deployment of the shipped checkpoint, with all three outputs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.deployment import DeploymentSpec
from loadtest.record import RequestRecord, Run
from loadtest.report import json_report
from tests.integration.deployments import deployed

NUM_WARMUP = 2

# As in Mooncake's trace: a clock that ticks every 3 s, one first block for all, conversations that come back longer.
MOONCAKE_ROWS = (
    (0, 6758, 50, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)),
    (0, 2290, 30, (0, 42, 43, 44, 45)),
    (0, 6760, 3, (0, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58)),
    (3000, 7600, 40, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 59, 60)),
    (3000, 2700, 20, (0, 42, 43, 44, 61, 62)),
    (6000, 8500, 25, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 59, 63, 64, 65)),
)
# As in Azure's: seven decimals, lines that end as on Windows.
AZURE_ROWS = (
    ("2023-11-16 18:15:46.6805900", 374, 44),
    ("2023-11-16 18:15:50.9951690", 396, 109),
    ("2023-11-16 18:15:51.2224670", 879, 55),
    ("2023-11-16 18:15:51.3910170", 91, 16),
    ("2023-11-16 18:15:52.5732450", 91, 16),
    ("2023-11-16 18:15:52.9921190", 381, 84),
)


@dataclass(frozen=True, slots=True)
class Reported:
    """What one `baton bench` left behind."""

    output: str  # of the terminal, without the breaks that its width made
    run: Run
    page: str

    @property
    def measured(self) -> list[RequestRecord]:
        return [record for record in self.run.records if not record.is_warmup]


async def bench(directory: Path, seed: int, *args: str) -> Reported:
    """Run it to its end, which must be a good one. A seed of its own for each, or prompts would be cached already."""
    json_path, html_path = directory / "run.json", directory / "run.html"
    flags = (
        *args,
        "--warmup",
        str(NUM_WARMUP),
        "--seed",
        str(seed),
        "--json",
        str(json_path),
        "--html",
        str(html_path),
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "bench", *flags), stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(60.0):
        output, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (0, "")
    text = " ".join(output.decode().replace("│", " ").split())
    return Reported(text, json_report.load(json_path), html_path.read_text(encoding="utf-8"))


@asynccontextmanager
async def router(model: Path) -> AsyncIterator[str]:
    """The address of a deployment of the checkpoint."""
    async with deployed(DeploymentSpec(model=model, restart=False)) as (deployment, _):
        yield deployment.router_address


def all_is_reported(reported: Reported, num_requests: int) -> None:
    """Every request was answered in full, and the three outputs say so."""
    assert len(reported.measured) == num_requests == len(reported.run.records) - NUM_WARMUP
    for record in reported.run.records:
        assert (record.outcome, record.num_output_tokens) == ("ok", record.max_tokens)
        assert record.lifetime_ns["total_ns"] > 0
    assert f"{num_requests} ok, 0 failed, {NUM_WARMUP} warm-up" in reported.output
    assert "no errors" in reported.output
    assert f"{num_requests} ok, 0 failed, {NUM_WARMUP} warm-up" in reported.page
    assert reported.run.info.model in reported.page


async def test_loads_of_every_kind_are_sent_and_reported(shipped_model: Path, tmp_path: Path) -> None:
    mooncake, azure = write_mooncake(tmp_path / "mooncake.jsonl"), write_azure(tmp_path / "azure.csv")
    async with router(shipped_model) as address:
        flags = ("--address", address, "--ttft-limit", "20", "--itl-limit", "20")
        arrivals = ("--poisson", "20", "--requests", "20", "--input-tokens", "uniform:20:90", "--output-tokens", "8")
        poisson = await bench(tmp_path, 1, *flags, *arrivals)
        scaled = ("--trace", str(mooncake), "--length-scale", "0.1", "--rate-scale", "4")
        with_prefixes = await bench(tmp_path, 2, *flags, *scaled)
        of_azure = await bench(tmp_path, 3, *flags, "--trace", str(azure), "--length-scale", "0.2", "--rate-scale", "4")
    _poisson_has_its_lengths_and_shares_nothing(poisson)
    _mooncake_shares_its_prefixes(with_prefixes)
    _azure_has_its_times_and_lengths(of_azure)


def _poisson_has_its_lengths_and_shares_nothing(reported: Reported) -> None:
    all_is_reported(reported, 20)
    assert reported.run.info.workload.startswith("Poisson, 20 requests/s")
    assert reported.run.info.scaling == ()
    assert {record.max_tokens for record in reported.measured} == {8}
    assert all(20 <= record.num_prompt_tokens <= 90 for record in reported.measured)
    assert sum(record.num_cached_tokens for record in reported.measured) == 0
    assert "20 of 20 100.0 %" in reported.output, "limits that nothing can miss here"


def _mooncake_shares_its_prefixes(reported: Reported) -> None:
    all_is_reported(reported, len(MOONCAKE_ROWS))
    lengths = [(record.num_prompt_tokens, record.max_tokens) for record in reported.measured]
    assert lengths == [(round(prompt * 0.1), max(1, round(output * 0.1))) for _, prompt, output, _ in MOONCAKE_ROWS]
    assert _reuses(reported, 3, 0, 640), "13 blocks of 51.2 tokens are shared, in full blocks of the cache"
    assert _reuses(reported, 5, 3, 704), "14 blocks"
    assert _reuses(reported, 4, 1, 192), "4 blocks"
    assert "prompt tokens cached" in reported.output
    assert reported.run.info.scaling == ("rate × 4", "lengths × 0.1")
    assert "5 of 6 rows shared a timestamp and were spread up to the next" in reported.run.info.workload
    for shown in (reported.output, reported.page):
        assert "rate × 4; lengths × 0.1" in shown


def _reuses(reported: Reported, row: int, earlier: int, num_tokens: int) -> bool:
    """Whether so many tokens of a row were cached, as they must be if the earlier one had an answer when it was sent:
    the trace leaves that much time, but the machine may have stood still."""
    later, first = reported.measured[row], reported.measured[earlier]
    return later.num_cached_tokens >= num_tokens or later.sent_s < first.arrivals[0].at_s


def _azure_has_its_times_and_lengths(reported: Reported) -> None:
    all_is_reported(reported, len(AZURE_ROWS))
    lengths = [(record.num_prompt_tokens, record.max_tokens) for record in reported.measured]
    assert lengths == [(round(prompt * 0.2), round(output * 0.2)) for _, prompt, output in AZURE_ROWS]
    assert reported.measured[-1].due_s == pytest.approx((52.992119 - 46.68059) / 4, abs=1e-6)
    assert reported.run.info.scaling == ("rate × 4", "lengths × 0.2")
    assert "spread" not in reported.run.info.workload
    assert "rate × 4; lengths × 0.2" in reported.output


def write_mooncake(path: Path) -> Path:
    """The rows as Mooncake's JSONL."""
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in MOONCAKE_ROWS), "utf-8")
    return path


def write_azure(path: Path) -> Path:
    """The rows as Azure's CSV."""
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        *(f"{at},{prompt},{output}" for at, prompt, output in AZURE_ROWS),
    ]
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return path
