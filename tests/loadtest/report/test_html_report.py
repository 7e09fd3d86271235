"""Pages are well formed, ask nobody for anything, let no outside text become markup, and stay small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from common.errors import InvalidArgument
from loadtest.goodput import Limits
from loadtest.rate_search import RateSearch, find_rate
from loadtest.record import Run
from loadtest.report import drawing, html_report
from tests.loadtest.sample_runs import ALL_FAILED, ODD_RUNS, random_run, request, run_of

LIMITS = Limits(0.5, (0.02, 0.05))
VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed by its own, and keeps what tests look at."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def texts_of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(runs: Sequence[Run], tmp_path: Path, limits: Limits = LIMITS) -> Page:
    path = tmp_path / "page.html"
    html_report.write(runs, limits, path)
    return Page(path.read_text(encoding="utf-8"))


async def a_search(num_requests: int = 40) -> RateSearch:
    async def measure(rate: float) -> Run:
        return random_run(rate, num_requests)

    return await find_rate(measure, LIMITS, itl_s=0.05, share=0.9, low_rate=1, high_rate=64)


def test_a_page_of_one_run_has_figures_charts_and_what_was_run(tmp_path: Path) -> None:
    run = run_of(request(0.0, (0.1, 0.11)), request(2.0, (2.1, 2.4)), command="baton bench --rate 0.5")
    page = page_of([run], tmp_path)
    assert page.texts_of("b") == ["50.0 %", "50.0 %", "100 ms", "300 ms", "1.67/s", "2"]
    assert page.count("svg") == 5
    assert "Requests in flight" in page.texts_of("h3")
    assert {"baton bench --rate 0.5", "2 cores", "2026-11-25T20:00:00+00:00", "7", "lengths × 0.05"} <= set(
        page.texts_of("dd")
    )
    assert "No errors." in page.texts_of("p")


def test_every_chart_has_named_axes_limits_and_tooltips(tmp_path: Path) -> None:
    page = page_of([random_run(4.0)], tmp_path)
    labels = page.texts_of("text")
    assert {"time", "share", "requests", "time of the run", "≤ 500 ms", "≤ 20 ms", "≤ 50 ms"} <= set(labels)
    assert "Queues and batches" in page.texts_of("h3")
    titles = page.texts_of("title")
    assert any(title.startswith("within ") and "requests/s: " in title for title in titles)
    assert any("decode batch: 4" in title for title in titles)
    assert any("p99" in title for title in titles)


def test_a_chart_alone_in_its_row_fills_it_with_text_as_large_as_elsewhere(tmp_path: Path) -> None:
    page = page_of([random_run(4.0)], tmp_path)
    widths = [int((attrs["viewbox"] or "").split()[2]) for tag, attrs in page.tags if tag == "svg"]
    assert widths == [drawing.WIDTH] * 4 + [drawing.WIDE]
    cards = [attrs["class"] for tag, attrs in page.tags if tag == "figure"]
    assert cards == ["card"] * 4 + ["card across"]
    ends = [float(end) for end in re.findall(r'class="frame" d="M54 36V242H(\d+)"', page.source)]
    assert ends[-1] - ends[0] == drawing.WIDE - drawing.WIDTH
    assert "across" not in page_of([random_run(4.0), random_run(2.0)], tmp_path).source.partition("</style>")[2]


def test_lines_that_are_the_same_are_one_line_and_one_entry_of_the_legend(tmp_path: Path) -> None:
    few_gaps = [request(float(index), (index + 0.1, index + 0.12, index + 0.15)) for index in range(9)]
    page = page_of([run_of(*few_gaps)], tmp_path)  # the largest of few gaps is their p99 as well
    assert page.texts_of("li") == ["every gap = p99 gap of the request", "mean TPOT of the request"]


def test_what_is_drawn_below_shows_beside_what_is_above() -> None:
    lines = [drawing.Line(name, 0, path) for name, path in (("a", "M0"), ("b", "M1"), ("c", "M0"), ("d", "M2"))]
    assert [(line.name, line.width_px) for line in drawing.distinct(lines)] == [("a = c", 2), ("b", 3), ("d", 4)]
    many = drawing.distinct([drawing.Line(str(index), 0, f"M{index}") for index in range(9)])
    assert {line.width_px for line in many} == {2.0}


def test_several_runs_are_drawn_against_their_rate(tmp_path: Path) -> None:
    page = page_of([random_run(8.0), random_run(2.0, seed=1), ALL_FAILED], tmp_path)
    assert "Goodput against rate" in page.texts_of("h3")
    assert page.count("details") == 3
    points = [title for title in page.texts_of("title") if title.endswith(", every gap")]
    assert len(points) == 3 * len(LIMITS.itl_s)
    rates = [float(text.split()[0]) for text in page.texts_of("summary")]
    assert rates == sorted(rates)


def test_each_case_has_a_line_for_each_limit(tmp_path: Path) -> None:
    rates_and_cases = [(8.0, "together"), (2.0, "apart"), (2.0, "together"), (8.0, "apart")]
    runs = [replace(random_run(rate), info=replace(random_run(rate).info, case=case)) for rate, case in rates_and_cases]
    page = page_of(runs, tmp_path)
    names = page.texts_of("summary")
    assert [name.split(",")[0] for name in names] == ["together", "together", "apart", "apart"]
    assert all(name.endswith(" requests/s") for name in names)
    legend = [text for text in page.texts_of("li") if "gaps ≤" in text]
    assert legend == [f"{case}, gaps ≤ {limit} ms" for case in ("together", "apart") for limit in (20, 50)]
    assert "together" in page.texts_of("dd")


def test_warnings_of_several_runs_are_named(tmp_path: Path) -> None:
    page = page_of([random_run(2.0), ALL_FAILED], tmp_path)
    assert any("requests/s: All 2 measured requests failed" in text for text in page.texts_of("p"))


async def test_a_search_shows_its_answer_and_what_was_asked_for(tmp_path: Path) -> None:
    search = await a_search()
    path = tmp_path / "search.html"
    html_report.write_search(search, LIMITS, path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts_of("b")[0] == f"{search.answer:.3g}/s"
    assert "asked for: 90.0 %" in page.texts_of("text")
    assert f"highest: {search.answer:.3g}/s" in page.texts_of("text")
    assert page.count("details") == len(search.probes)
    assert any("gaps ≤ 50 ms" in text for text in page.texts_of("small"))


@pytest.mark.parametrize("run", ODD_RUNS.values(), ids=ODD_RUNS)
def test_odd_runs_make_a_page(run: Run, tmp_path: Path) -> None:
    page = page_of([run], tmp_path)
    assert "nan" not in page.source
    assert page_of([run, run], tmp_path).count("details") == 2


def test_a_page_says_why_it_is_empty(tmp_path: Path) -> None:
    page = page_of([ODD_RUNS["empty"]], tmp_path)
    assert any("nothing to report" in text for text in page.texts_of("p"))
    assert page.texts_of("p").count("Nothing was measured that could be drawn here.") == 5
    failed = page_of([ALL_FAILED], tmp_path)
    assert any("All 2 measured requests failed" in text for text in failed.texts_of("p"))
    assert "Unavailable" in failed.texts_of("td")


def test_runs_without_any_limit_make_a_page(tmp_path: Path) -> None:
    page = page_of([random_run(4.0), random_run(8.0)], tmp_path, Limits(None, ()))
    assert "any" in page.texts_of("td")
    assert any("any TTFT" in text for text in page.texts_of("small"))


def test_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="at least one run"):
        html_report.write([], LIMITS, tmp_path / "page.html")


def test_a_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = page_of([random_run(4.0), random_run(8.0)], tmp_path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"} & attributes
    assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|//\w", page.source)
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_text_from_outside_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = '</title></style><script>alert(1)</script><img src=x onerror="a()">\'&amp;'
    failed = request(0.0, outcome=hostile, detail=hostile)
    slow = request(0.0, (1.0, 2.0), lifetime_ns={hostile: 1})
    run = run_of(failed, slow, model=hostile, command=hostile)
    for runs in ([run], [run, run]):
        page = page_of(runs, tmp_path)
        assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
        assert page.texts_of("title")[0] == f"Load test of {hostile}"
        assert hostile in page.texts_of("span")
        assert hostile in page.texts_of("dd")
        assert page.texts_of("td").count(hostile) == 2 * len(runs)


def test_a_large_run_makes_a_small_page(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    arrived_s = np.cumsum(random.lognormal(-4, 0.5, (2_000, 50)), axis=1)
    records = [request(n * 0.01, (n * 0.01 + times).tolist()) for n, times in enumerate(arrived_s)]
    page = page_of([run_of(*records)], tmp_path)
    assert len(page.source) < 150_000
    for tag, attrs in page.tags:
        if tag == "path":
            assert (attrs["d"] or "").count("V") <= 401


def test_twelve_runs_make_a_page_below_two_megabytes(tmp_path: Path) -> None:
    runs = [random_run(1.0 + n, num_requests=300) for n in range(12)]
    page = page_of(runs, tmp_path)
    assert len(page.source.encode()) < 2_000_000
