"""Goodput of prefill and decode apart, against both on every worker, on the same devices and under the same load.

    python -m benchmarks.goodput --lengths-from azure_2023_conversation.csv [--device cuda --shape llama-3.1-8b]

Two devices each time: one prefill and one decode worker, then two workers that compute prompts in chunks beside their
decode steps, for each chunk budget. First tokens are released `steady`. Each rate is one run of Poisson arrivals with
the trace's lengths, with prompts of its own: what one run leaves in the prefix caches is of no use to the next. For
every limit on gaps the colocated case is judged by its best chunk budget. On a GPU steps with chunks are captured
graphs like those without. Without GPUs it runs the shipped checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import tokenizers
from rich.console import Console
from rich.table import Table

from cli.deployment import Deployment, DeploymentSpec
from common.models.config import read_model_config
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, run_load_test
from loadtest.goodput import Limits, goodput
from loadtest.measured import measured_part
from loadtest.record import Run
from loadtest.report import html_report, json_report
from loadtest.sizes import TraceSizes
from loadtest.statistics import summarize
from loadtest.targets.base import TargetSpec
from loadtest.traces import read_trace
from loadtest.workload import Workload

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "pystdlib-7m"
SHAPES = Path(__file__).parent / "shapes"
GPU_ARGS = ("--random-weights",)
STEADY = ("--first-token", "steady", "--max-in-flight", "2048")
READY_TIMEOUT_S = 180.0
CLIENT_PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One way to use two devices."""

    name: str
    spec: DeploymentSpec
    rates: tuple[float, ...]  # requests/s over both devices, lowest first


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, in which order."""

    num_requests: int  # of each run
    limits: Limits
    share: float  # of the requests, that must meet a limit
    sizes: TraceSizes
    seed: int


@dataclass(frozen=True, slots=True)
class Point:
    """One case at one rate: of each limit on gaps, the share of requests that met it and the limit on TTFT."""

    case: str
    rate: float
    shares: tuple[float, ...]


def cases(args: argparse.Namespace, model: Path) -> tuple[Case, list[Case]]:
    """The disaggregated case, and a colocated one for each chunk budget."""
    on_gpu = args.device == "cuda"
    common = GPU_ARGS if on_gpu else ()
    prefill_args = (*common, *(("--kv-bytes", str(args.prefill_kv_bytes)) if on_gpu else ()))
    prefill_args += ("--capture-tokens", str(args.capture_tokens))
    decode_args = (
        *common,
        *(("--kv-bytes", str(args.decode_kv_bytes)) if on_gpu else ()),
        "--max-rows",
        str(args.rows),
    )
    apart = DeploymentSpec(
        model=model, device=args.device, prefill_args=prefill_args, decode_args=decode_args, router_args=STEADY
    )
    together = [
        Case(
            f"chunks of {chunk}",
            DeploymentSpec(
                model=model,
                num_prefill=0,
                num_decode=2,
                device=args.device,
                decode_args=(*decode_args, "--chunk-tokens", str(chunk), "--capture-chunks"),
                router_args=(*STEADY, "--local-prefill", "always"),
            ),
            tuple(sorted(args.together_rates or args.rates)),
        )
        for chunk in args.chunks
    ]
    return Case("prefill and decode apart", apart, tuple(sorted(args.rates))), together


@asynccontextmanager
async def deployed(case: Case, log_dir: Path) -> AsyncIterator[str]:
    """The address of the case's router, once all its workers are ready."""
    spec = replace(case.spec, log_dir=log_dir)
    async with Deployment(spec, on_event=lambda event: print(event, file=sys.stderr)) as deployment:
        await deployment.ready(READY_TIMEOUT_S)
        yield deployment.router_address


class Comparison:
    """Measures case after case, and keeps what was seen."""

    def __init__(self, plan: Plan, out: Path, console: Console) -> None:
        self._plan = plan
        self._out = out
        self._console = console
        self._command = " ".join(["python -m benchmarks.goodput", *sys.argv[1:]])
        self.runs: list[Run] = []
        self.points: list[Point] = []

    async def measure(self, case: Case) -> None:
        """Every rate, on one deployment."""
        async with deployed(case, self._out) as address:
            for rate in case.rates:
                run = await self._run(case.name, address, rate)
                json_report.write(run, self._plan.limits, self._out / f"run-{len(self.runs)}.json")
                self._note(case.name, rate, run)

    async def _run(self, name: str, address: str, rate: float) -> Run:
        plan = self._plan
        target = TargetSpec("baton", address)
        model = await describe_target(target)
        seed = plan.seed + len(self.runs)
        workload = Workload(Arrivals(rate), plan.sizes, seed, plan.num_requests, clip_tokens=model.context_length)
        test = LoadTest(target, model, workload, num_warmup=8, num_processes=CLIENT_PROCESSES, command=self._command)
        run = await run_load_test(test, asyncio.Event(), Observed())
        run = msgspec.structs.replace(run, info=msgspec.structs.replace(run.info, case=name))
        self.runs.append(run)
        return run

    def _note(self, name: str, rate: float, run: Run) -> None:
        measured = measured_part(run)
        summary = summarize(measured)
        limits = self._plan.limits
        shares = tuple(goodput(measured, limits.ttft_s, itl_s).share or 0.0 for itl_s in limits.itl_s)
        self.points.append(Point(name, rate, shares))
        met = ", ".join(f"{itl_s * 1e3:g} ms {share:.1%}" for itl_s, share in zip(limits.itl_s, shares, strict=True))
        ttft = "-" if summary.ttft is None else f"{summary.ttft.p50_s * 1e3:.0f} ms"
        cached = summary.cached_share or 0.0
        self._console.print(f"{name}, {rate:g} requests/s: {met}; TTFT p50 {ttft}, {cached:.0%} of the prompts cached")
        for phase in ("prefill", "exposed_handoff"):
            if (found := summary.phases.get(phase)) is not None:
                self._console.print(f"  {phase}: p50 {found.p50_s * 1e3:.2f} ms, p99 {found.p99_s * 1e3:.2f} ms")
        for warning in summary.warnings:
            self._console.print(f"  ! {warning}")

    def table(self) -> Table:
        """Every point."""
        table = Table("case", "requests/s", *(f"≤ {itl_s * 1e3:g} ms" for itl_s in self._plan.limits.itl_s))
        for point in self.points:
            table.add_row(point.case, f"{point.rate:g}", *(f"{share:.0%}" for share in point.shares))
        return table

    def verdict(self, apart: str) -> Table:
        """Of each limit: the highest rate at which enough requests met it, apart and with the best chunk budget."""
        table = Table("gaps", "apart, requests/s", "together, requests/s", "best chunks")
        for index, itl_s in enumerate(self._plan.limits.itl_s):
            met = [point for point in self.points if point.shares[index] >= self._plan.share]
            split = max((point.rate for point in met if point.case == apart), default=0.0)
            best = max(
                (point for point in met if point.case != apart), key=lambda p: (p.rate, p.shares[index]), default=None
            )
            together = ("none", "-") if best is None else (f"{best.rate:g}", best.case)
            table.add_row(f"≤ {itl_s * 1e3:g} ms", f"{split:g}" if split else "none", *together)
        return table


async def compare(apart: Case, together: list[Case], plan: Plan, out: Path, console: Console) -> None:
    """Measure and print everything."""
    comparison = Comparison(plan, out, console)
    for case in (apart, *together):
        await comparison.measure(case)
    console.print(comparison.table())
    console.print(f"highest of these rates at which {plan.share:.0%} of the requests meet the limits")
    console.print(comparison.verdict(apart.name))
    html_report.write(comparison.runs, plan.limits, out / "goodput.html")


def write_model(shape: str, directory: Path) -> Path:
    """A directory for random weights: the shape's config.json, and a tokenizer that has a word for every id."""
    shutil.copy(SHAPES / f"{shape}.json", directory / "config.json")
    vocab_size = read_model_config(directory).vocab_size
    words = tokenizers.models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(directory / "tokenizer.json"))
    return directory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--lengths-from", type=Path, required=True, help="trace whose lengths are drawn")
    add("--length-scale", type=float, default=1.0, help="factor on the trace's lengths (1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where ranks compute (cpu)")
    add("--shape", default="llama-3.1-8b", help="of the random weights, on GPUs (llama-3.1-8b)")
    add("--rates", type=float, nargs="+", default=[8.0, 12.0, 16.0, 20.0], help="requests/s over both devices")
    add("--together-rates", type=float, nargs="+", help="those of the colocated cases, if not the same")
    add("--requests", type=int, default=500, help="requests of each run (500)")
    add("--chunks", type=int, nargs="*", default=[64, 128, 256, 512], help="chunk budgets, tokens; empty: apart alone")
    add("--ttft-limit", type=float, default=0.5, help="seconds (0.5)")
    add("--itl-limits", type=float, nargs="+", default=[0.008, 0.010, 0.012, 0.015, 0.025], help="seconds")
    add("--share", type=float, default=0.9, help="of the requests, that must meet the limits (0.9)")
    add("--rows", type=int, default=128, help="sequences that a worker decodes at once (128)")
    add("--prefill-kv-bytes", type=int, default=20 << 30, help="KV memory of a prefill worker on a GPU (20 GiB)")
    add("--decode-kv-bytes", type=int, default=48 << 30, help="KV memory of a decode worker on a GPU (48 GiB)")
    add("--capture-tokens", type=int, default=512, help="of the prefill worker (512)")
    add("--seed", type=int, default=1, help="of arrivals and prompts (1)")
    add("--out", type=Path, default=Path("goodput"), help="directory of the reports (goodput)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    limits = Limits(args.ttft_limit, tuple(args.itl_limits))
    sizes = TraceSizes(read_trace(args.lengths_from, None), args.length_scale)
    plan = Plan(args.requests, limits, args.share, sizes, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(args.shape, Path(directory)) if args.device == "cuda" else SHIPPED
        apart, together = cases(args, model)
        asyncio.run(compare(apart, together, plan, args.out, Console(width=140)))


if __name__ == "__main__":
    main()
