"""Send a measured load to a running server and report latencies, throughput and goodput."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cli.bench_options import add_arguments as add_arguments
from cli.bench_options import clipped, limits_from, targets_from, workload_from
from cli.bench_progress import shown_progress
from cli.bench_reports import HTML_FLAG, JSON_FLAG, Report, check_writable, numbered, write_reports
from cli.bench_verdict import Verdict, verdict_of_runs, verdict_of_search
from cli.console import open_console
from common.errors import BatonError, InvalidArgument
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, observed_run, run_load_test
from loadtest.goodput import Limits
from loadtest.rate_search import RateSearch, find_rate
from loadtest.record import Run
from loadtest.report import html_report, json_report, terminal
from loadtest.targets.base import TargetSpec, fitting_all


async def run(args: argparse.Namespace) -> int:
    """Run `baton bench`. The status is 0 if the runs went to their ends and few requests failed (`bench_verdict`)."""
    targets = targets_from(args)
    json_paths = numbered(args.json, len(targets))
    _check_paths(json_paths, args.html)
    limits = limits_from(args)
    tests = await _load_tests(targets, args)
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if args.find_rate is None:
        verdict = await _report_runs(tests, json_paths, limits, args.html, stop)
    else:
        verdict = _report_search(await _search(tests[0], limits, args, stop), limits, args)
    for complaint in verdict.complaints:
        print(f"baton bench: {complaint}", file=sys.stderr)
    return verdict.status


def _check_paths(json_paths: Sequence[Path | None], html_path: Path | None) -> None:
    for path in json_paths:
        check_writable(JSON_FLAG, path)
    check_writable(HTML_FLAG, html_path)
    if html_path is not None and html_path in json_paths:
        raise InvalidArgument(HTML_FLAG, str(html_path), f"is the path of {JSON_FLAG} too")


async def _load_tests(targets: Sequence[TargetSpec], args: argparse.Namespace) -> list[LoadTest]:
    """One for each target, with the same requests for all of them."""
    workload = workload_from(args)
    models = fitting_all([await describe_target(target) for target in targets])
    workload = clipped(workload, args, models[0].context_length)
    return [
        LoadTest(
            target=target,
            model=model,
            workload=workload,
            timeout_s=args.timeout,
            num_warmup=args.warmup,
            num_processes=args.processes,
            max_in_flight=args.max_in_flight,
            worker_addresses=tuple(args.worker),
            command=shlex.join(["baton", *sys.argv[1:]]),
            case=target.address if len(targets) > 1 else "",
        )
        for target, model in zip(targets, models, strict=True)
    ]


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM ends the run and keeps what was measured; the second SIGINT ends the program."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, first)
    loop.add_signal_handler(signal.SIGTERM, stop.set)


async def _run_once(test: LoadTest, stop: asyncio.Event, title: str) -> Run:
    """A run; one that failed in the middle is what had been measured by then. Raises if that is nothing."""
    observed = Observed()
    try:
        async with shown_progress(observed, title, test.workload.duration_s):
            return await run_load_test(test, stop, observed)
    except BatonError as error:
        if not observed.records:
            raise
        return observed_run(test, observed, was_interrupted=True, failure=f"{type(error).__name__}: {error}")


async def _run_all(tests: Sequence[LoadTest], stop: asyncio.Event) -> tuple[list[Run], str]:
    """The runs, and what kept the next one from being made, if something did. Raises if that is the first."""
    runs: list[Run] = []
    for test in tests:
        try:
            runs.append(await _run_once(test, stop, test.case or "load test"))
        except BatonError as error:
            if not runs:
                raise
            return runs, f"{test.case}: {type(error).__name__}: {error}"
        if runs[-1].info.was_interrupted:
            break
    return runs, ""


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


async def _report_runs(
    tests: Sequence[LoadTest],
    json_paths: Sequence[Path | None],
    limits: Limits,
    html_path: Path | None,
    stop: asyncio.Event,
) -> Verdict:
    runs, failure = await _run_all(tests, stop)
    reports = []
    for run, path in zip(runs, json_paths, strict=False):  # a later one may not have come to its turn
        terminal.print_report(run, limits, open_console())
        reports.append(Report(JSON_FLAG, path, partial(json_report.write, run, limits)))
    if len(runs) > 1:
        terminal.print_comparison(runs, limits, open_console())
    reports.append(Report(HTML_FLAG, html_path, partial(html_report.write, runs, limits)))
    write_reports(reports)
    return verdict_of_runs(runs, failure)


def _report_search(search: RateSearch, limits: Limits, args: argparse.Namespace) -> Verdict:
    terminal.print_search(search, limits, open_console())
    json = Report(JSON_FLAG, args.json, partial(json_report.write_search, search, limits))
    html = Report(HTML_FLAG, args.html, partial(html_report.write_search, search, limits))
    write_reports([json, html])
    return verdict_of_search(search)
