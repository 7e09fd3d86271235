"""Send a measured load to a running server and report latencies, throughput and goodput."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from cli.bench_options import add_arguments as add_arguments
from cli.bench_options import clipped, limits_from, target_from, workload_from
from cli.bench_progress import shown_progress
from cli.bench_reports import Report, check_writable, keep, write_reports
from common.errors import BatonError, InternalError, InvalidArgument
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, observed_run, run_load_test
from loadtest.goodput import Limits
from loadtest.rate_search import RateSearch, find_rate
from loadtest.record import Run
from loadtest.report import html_report, json_report, terminal

_INTERRUPTED = 130


async def run(args: argparse.Namespace) -> int:
    """Run `baton bench`. The status is 0 only if at least one measured request ended well."""
    check_writable("--json", args.json)
    check_writable("--html", args.html)
    if args.json is not None and args.json == args.html:
        raise InvalidArgument("--html", str(args.html), "is the path of --json too")
    limits = limits_from(args)
    test = await _load_test(args)
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if args.find_rate is None:
        return _report_run(await _run_once(test, stop, "load test"), limits, args)
    return _report_search(await _search(test, limits, args, stop), limits, args)


async def _load_test(args: argparse.Namespace) -> LoadTest:
    target = target_from(args)
    workload = workload_from(args)
    model = await describe_target(target)
    return LoadTest(
        target=target,
        model=model,
        workload=clipped(workload, args, model.context_length),
        timeout_s=args.timeout,
        num_warmup=args.warmup,
        num_processes=args.processes,
        max_in_flight=args.max_in_flight,
        worker_addresses=tuple(args.worker),
        command=shlex.join(["baton", *sys.argv[1:]]),
    )


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM ends the run and keeps what was measured; the second SIGINT ends the program."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, first)
    loop.add_signal_handler(signal.SIGTERM, stop.set)


async def _run_once(test: LoadTest, stop: asyncio.Event, title: str) -> Run:
    observed = Observed()
    try:
        async with shown_progress(observed, title, test.workload.duration_s):
            return await run_load_test(test, stop, observed)
    except BatonError as error:
        if not observed.records:
            raise
        run = observed_run(test, observed, was_interrupted=True)
        path = keep(partial(json_report.write, run, Limits(None, ())))
        raise InternalError(f"{type(error).__name__}: {error}; what was measured is kept in {path}") from error


async def _search(test: LoadTest, limits: Limits, args: argparse.Namespace, stop: asyncio.Event) -> RateSearch:
    first = test.workload
    assert isinstance(first.pacing, Arrivals)
    cv = first.pacing.cv
    num_runs = 0

    async def measure(rate: float) -> Run:
        nonlocal num_runs
        # Another seed for each run: its prompts must not be those that the last run left in a prefix cache.
        workload = replace(first, pacing=Arrivals(rate, cv), seed=first.seed + num_runs)
        num_runs += 1
        return await _run_once(replace(test, workload=workload), stop, f"run {num_runs}, {rate:.3g} requests/s")

    return await find_rate(
        measure,
        limits,
        limits.itl_s[0],
        args.find_rate,
        args.low_rate,
        args.high_rate,
        resolution=args.resolution,
        max_runs=args.max_runs,
    )


def _report_run(run: Run, limits: Limits, args: argparse.Namespace) -> int:
    terminal.print_report(run, limits, Console())
    write_json = partial(json_report.write, run, limits)
    write_reports(_reports(args, write_json, partial(html_report.write, [run], limits)), write_json)
    if run.info.was_interrupted:
        return _INTERRUPTED
    return 0 if any(record.is_ok and not record.is_warmup for record in run.records) else 1


def _report_search(search: RateSearch, limits: Limits, args: argparse.Namespace) -> int:
    terminal.print_search(search, limits, Console())
    write_json = partial(json_report.write_search, search, limits)
    write_reports(_reports(args, write_json, partial(html_report.write_search, search, limits)), write_json)
    if any(probe.run.info.was_interrupted for probe in search.probes):
        return _INTERRUPTED
    return 0 if search.answer is not None else 1


def _reports(
    args: argparse.Namespace, write_json: Callable[[Path], None], write_html: Callable[[Path], None]
) -> list[Report]:
    wanted = (Report("--json", args.json, write_json), Report("--html", args.html, write_html))
    return [report for report in wanted if report.path is not None]
