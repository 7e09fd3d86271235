"""Tables carry the figures and what was run, for odd runs too; outside text cannot reach the terminal as codes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from common.errors import Unavailable
from loadtest.goodput import Limits
from loadtest.rate_search import Ending, RateSearch, find_rate
from loadtest.record import Run
from loadtest.report.terminal import print_comparison, print_report, print_search
from tests.loadtest.sample_runs import ALL_FAILED, ODD_RUNS, random_run, request, run_of

LIMITS = Limits(0.5, (0.02, 0.05))


def printed(run: Run) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    print_report(run, LIMITS, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def printed_search(search: RateSearch) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    print_search(search, LIMITS, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str, first: str) -> list[str]:
    """The cells of the one line that starts with this cell."""
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(first)]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_report_carries_what_was_run_and_the_figures() -> None:
    text = printed(run_of(request(0.0, (0.1, 0.11)), request(2.0, (2.1, 2.4)), command="baton bench --rate 0.5"))
    assert cells(text, "machine") == ["machine", "2 cores"]
    assert cells(text, "command") == ["command", "baton bench --rate 0.5"]
    assert cells(text, "scaling") == ["scaling", "lengths × 0.05"]
    assert cells(text, "seed") == ["seed", "7"]
    assert cells(text, "started") == ["started", "2026-11-25T20:00:00+00:00"]
    assert cells(text, "gap")[:7] == ["gap", "2", "155 ms", "10.0 ms", "300 ms", "300 ms", "300 ms"]
    assert cells(text, "requests finished") == ["requests finished", "0.833/s"]
    goodputs = [line for line in text.splitlines() if "every gap " in line]
    assert len(goodputs) == len(LIMITS.itl_s)
    assert all("1 of 2" in line and "50.0 %" in line for line in goodputs)
    assert "no errors" in text


def test_errors_are_shown_by_type() -> None:
    assert cells(printed(ALL_FAILED), "Unavailable") == ["Unavailable", "2", "no worker"]


@pytest.mark.parametrize("run", ODD_RUNS.values(), ids=ODD_RUNS)
def test_odd_runs_are_printed(run: Run) -> None:
    assert "goodput" in printed(run)


def test_runs_without_figures_say_why() -> None:
    assert "nothing to report" in printed(ODD_RUNS["empty"])
    assert "All 2 measured requests failed" in printed(ODD_RUNS["all failed"])
    assert "1 interrupted" in printed(ODD_RUNS["interrupted"])


def test_text_from_outside_is_shown_as_it_is_without_control_codes() -> None:
    hostile = "[bold]a[/] \x1b[31mred\x1b]0;title\x07 [/nothing]"
    failed = request(0.0, outcome="[red]Odd[/]", detail=hostile, lifetime_ns={})
    text = printed(run_of(failed, request(0.0, (1.0,), lifetime_ns={"[b]queue_ns": 1}), model=hostile))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.count("[bold]a[/]  [31mred ]0;title  [/nothing]") == 2
    assert "[red]Odd[/]" in text
    assert "[b]queue" in text


async def test_a_search_lists_rates_in_order_and_the_answer() -> None:
    async def measure(rate: float) -> Run:
        return random_run(rate, num_requests=60 if rate < 4 else 30)

    search = await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, low_rate=1, high_rate=64)
    text = printed_search(search)
    rates = [
        float(line.strip("│").split()[0])
        for line in text.splitlines()
        if "meets" in line or "misses" in line
        if " of " in line and "│" in line
    ]
    assert rates == sorted(rates)
    assert len(rates) == len(search.probes)
    assert f"highest rate: {search.answer:.3g} requests/s ({search.ending})" in text


async def test_a_search_without_an_answer_says_so() -> None:
    async def measure(rate: float) -> Run:
        return ALL_FAILED

    search = await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, low_rate=1, high_rate=2)
    assert "no rate met the limits (even the lowest rate misses the limits)" in printed_search(search)


async def test_a_search_names_the_warnings_of_each_rate_and_why_it_ended() -> None:
    late = [request(0.0, (1.0,), sent_s=0.9)] * 10

    async def measure(rate: float) -> Run:
        return run_of(*late, case="apart") if rate == 2 else run_of(*[request(0.0, (0.1,))] * 10, case="apart")

    search = await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, low_rate=1, high_rate=4)
    text = printed_search(search)
    assert "! 2 requests/s: The generator was late: the p99 of sent − due is 900.0 ms" in text
    assert cells(text, "2 ")[-1] == "generator"
    assert f"highest rate: 1 requests/s ({Ending.GENERATOR_LIMIT})" in text
    assert cells(text, "case") == ["case", "apart"]


def test_runs_of_the_same_load_are_compared_in_a_table() -> None:
    runs = [
        run_of(request(0.0, (0.1, 0.11)), request(2.0, (2.1, 2.4)), case="[b]apart"),
        run_of(request(0.0, (0.2, 0.21)), case="together"),
    ]
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    print_comparison(runs, LIMITS, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert cells(text, "[b]apart")[:7] == ["[b]apart", "1 of 2", "50.0 %", "100 ms", "100 ms", "10.0 ms", "300 ms"]
    assert cells(text, "together")[:4] == ["together", "1 of 1", "100.0 %", "200 ms"]


async def test_an_error_that_ended_a_search_is_shown_without_control_codes() -> None:
    async def measure(rate: float) -> Run:
        if rate == 2:
            raise Unavailable("\x1b[31mgone")
        return run_of(request(0.0, (0.1,)))

    search = await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, low_rate=1, high_rate=4)
    assert "highest rate: 1 requests/s (a run failed: Unavailable:  [31mgone)" in printed_search(search)


def test_a_run_that_was_cut_short_says_of_what() -> None:
    text = printed(run_of(request(0.0, (0.1,)), was_interrupted=True, failure="InternalError: gone"))
    assert cells(text, "duration")[1].endswith("cut short: InternalError: gone")
