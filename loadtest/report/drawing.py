"""From curves to a chart that the template draws: axes, lines, limits and what pointing at a place tells. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadtest.report import wording
from loadtest.report.curves import Curve, thin_distribution, thin_timeline
from loadtest.report.plots import LABEL_GAP_PX, Scale, line_path, linear_scale, log_scale, step_path, ticks

WIDTH, HEIGHT = 480, 284
WIDE = 1010  # of a chart across both columns of the page: text is as large as in the others then
_RIGHT_MARGIN = 14
LEFT, RIGHT, TOP, BOTTOM = 54, WIDTH - _RIGHT_MARGIN, 36, HEIGHT - 42
_LINE_WIDTH, _RIM = 2.0, 1.0
_MAX_RIMMED = 4
_NUM_STRIPS = 48
_ROW_GAP_PX = 20.0  # between ticks one above the other: the height of a label
_MIN_TIME_S = 1e-6  # an axis of times goes no further down, one of shares no further than `_MIN_SHARE`
_MIN_SHARE = 1e-6
_FIRST_HUE, _LAST_HUE = 215, 15  # blue, by way of green and yellow, to red


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    px: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """The name of an axis, and its ticks."""

    label: str
    ticks: tuple[Tick, ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """A place of a line, and what pointing at it tells."""

    x_px: float
    y_px: float
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """One drawn line; `hue` is its colour in degrees. What is drawn below others is wider, and shows beside them."""

    name: str
    hue: int
    path: str
    dots: tuple[Dot, ...] = ()
    width_px: float = _LINE_WIDTH


@dataclass(frozen=True, slots=True)
class Rule:
    """A line across the plot: a limit, or a share that was asked for."""

    px: float
    label: str
    is_upright: bool = True


@dataclass(frozen=True, slots=True)
class Strip:
    """An upright part of the plot; pointing at it tells the value of every line there."""

    x_px: float
    width_px: float
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """All that is drawn. Without axes there is nothing to draw, and the page says so."""

    title: str
    note: str
    x: Axis | None = None
    y: Axis | None = None
    lines: tuple[Line, ...] = ()
    rules: tuple[Rule, ...] = ()
    strips: tuple[Strip, ...] = ()
    width: int = WIDTH

    @property
    def right(self) -> int:
        """Where the plot ends."""
        return self.width - _RIGHT_MARGIN


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point of a line, and what pointing at it tells."""

    x: float
    y: float
    title: str


def hues(num_lines: int) -> tuple[int, ...]:
    """So many colours, in an order that the eye can follow."""
    return tuple(round(hue) for hue in np.linspace(_FIRST_HUE, _LAST_HUE, num_lines))


def draw_distributions(
    chart: Chart,
    curves: Sequence[Curve],
    colours: Sequence[int],
    limits_s: Sequence[float],
    max_points: int,
    percents: Sequence[int] = (),
) -> Chart:
    """Shares within a time against the time, on a logarithmic axis, with dots at the percentiles asked for."""
    x = _time_scale(curves, limits_s)
    if x is None:
        return chart
    y = linear_scale(1.0, BOTTOM, TOP)
    lines = [
        Line(
            name=curve.name,
            hue=hue,
            path=f"{step_path(thin_distribution(curve, max_points), x, y)}H{RIGHT}",
            dots=_percentile_dots(curve, percents, x, y),
        )
        for curve, hue in zip(curves, colours, strict=True)
        if curve.x.size
    ]
    strips = _strips(curves, x, lambda time_s: f"within {wording.time(time_s)}", wording.share)
    axes = (_time_axis(x), Axis("share", _ticks(y, wording.short_share)))
    return replace(chart, x=axes[0], y=axes[1], lines=distinct(lines), rules=_limit_rules(x, limits_s), strips=strips)


def draw_tails(
    chart: Chart, curves: Sequence[Curve], colours: Sequence[int], limits_s: Sequence[float], max_points: int
) -> Chart:
    """Shares beyond a time against the time, both on logarithmic axes."""
    x = _time_scale(curves, limits_s)
    if x is None:
        return chart
    least = min(float(curve.y[-1]) for curve in curves if curve.x.size)
    y = Scale(max(least, _MIN_SHARE) / 1.3, 1.0, BOTTOM, TOP, is_log=True)
    lines = [
        Line(curve.name, hue, step_path(thin_distribution(curve, max_points), x, y))
        for curve, hue in zip(curves, colours, strict=True)
        if curve.x.size
    ]
    strips = _strips(curves, x, lambda time_s: f"longer than {wording.time(time_s)}", _small_share)
    axes = (_time_axis(x), Axis("share", _ticks(y, wording.short_share, min_gap_px=_ROW_GAP_PX)))
    return replace(chart, x=axes[0], y=axes[1], lines=distinct(lines), rules=_limit_rules(x, limits_s), strips=strips)


def draw_timeline(chart: Chart, curves: Sequence[Curve], max_points: int) -> Chart:
    """Counts over the time of the run."""
    ends_s = [float(curve.x[-1]) for curve in curves if curve.x.size]
    if not ends_s or max(ends_s) <= 0:
        return chart
    x = Scale(0.0, max(ends_s), LEFT, chart.right)
    y = linear_scale(max(1.0, *(float(curve.y.max()) for curve in curves)), BOTTOM, TOP)
    lines = [
        Line(curve.name, hue, step_path(thin_timeline(curve, max_points), x, y))
        for curve, hue in zip(curves, hues(len(curves)), strict=True)
    ]
    strips = _strips(curves, x, lambda time_s: f"at {wording.time(time_s)}", lambda num: f"{num:,.0f}")
    counts = Axis("requests", _ticks(y, lambda num: f"{num:,g}", whole=True))
    return replace(chart, x=_time_axis(x, "time of the run"), y=counts, lines=distinct(lines), strips=strips)


def draw_against_rate(
    chart: Chart, lines: Sequence[tuple[str, Sequence[Point]]], share: float | None, answer: float | None
) -> Chart:
    """Shares against the request rate, a point for each run; `share` was asked for, `answer` was found."""
    rates = [point.x for _, points in lines for point in points]
    if not rates:
        return chart
    x, y = linear_scale(max(rates) * 1.02, LEFT, RIGHT), linear_scale(1.0, BOTTOM, TOP)
    drawn = [_line(name, hue, points, x, y) for (name, points), hue in zip(lines, hues(len(lines)), strict=True)]
    rules = [] if share is None else [Rule(y.pixel(share), f"asked for: {wording.share(share)}", is_upright=False)]
    rules += [] if answer is None else [Rule(x.pixel(answer), f"highest: {answer:.3g}/s")]
    rate_axis = Axis("requests/s", _ticks(x, lambda rate: f"{rate:,.6g}"))
    share_axis = Axis("share", _ticks(y, wording.short_share))
    return replace(chart, x=rate_axis, y=share_axis, lines=rimmed(drawn), rules=tuple(rules))


def distinct(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Lines that are the same become one with the names of all; the rest are `rimmed`."""
    merged: dict[str, Line] = {}
    for line in lines:
        first = merged.get(line.path)
        merged[line.path] = line if first is None else replace(first, name=f"{first.name} = {line.name}")
    return rimmed(tuple(merged.values()))


def rimmed(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Of a few lines, each shows beside those above it; the first is drawn on top."""
    rim = _RIM if len(lines) <= _MAX_RIMMED else 0.0
    return tuple(replace(line, width_px=_LINE_WIDTH + rim * index) for index, line in enumerate(lines))


def _line(name: str, hue: int, points: Sequence[Point], x: Scale, y: Scale) -> Line:
    path = line_path(np.array([point.x for point in points]), np.array([point.y for point in points]), x, y)
    return Line(name, hue, path, tuple(Dot(x.pixel(point.x), y.pixel(point.y), point.title) for point in points))


def _time_scale(curves: Sequence[Curve], limits_s: Sequence[float]) -> Scale | None:
    """Holds every time above zero, and the limits; None if there is no time at all."""
    ends_s = [float(end) for curve in curves if curve.x.size for end in (_first_above_zero(curve), curve.x[-1])]
    if not ends_s:
        return None
    ends_s += limits_s
    return log_scale(max(min(ends_s), _MIN_TIME_S), max(*ends_s, _MIN_TIME_S), LEFT, RIGHT)


def _first_above_zero(curve: Curve) -> float:
    index = int(np.searchsorted(curve.x, 0.0, side="right"))
    return float(curve.x[min(index, curve.x.size - 1)])


def _percentile_dots(curve: Curve, percents: Sequence[int], x: Scale, y: Scale) -> tuple[Dot, ...]:
    ranks = [-(-percent * curve.x.size // 100) - 1 for percent in percents]
    return tuple(
        Dot(x.pixel(curve.x[rank]), y.pixel(curve.y[rank]), f"{curve.name}: p{percent} {wording.time(curve.x[rank])}")
        for percent, rank in zip(percents, ranks, strict=True)
    )


def _strips(
    curves: Sequence[Curve], x: Scale, place: Callable[[float], str], value: Callable[[float], str]
) -> tuple[Strip, ...]:
    width_px = (x.end_px - x.start_px) / _NUM_STRIPS
    strips = []
    for index in range(_NUM_STRIPS):
        middle = x.value(LEFT + (index + 0.5) * width_px)
        told = [f"{curve.name}: {value(curve.at(middle))}" for curve in curves if curve.x.size]
        strips.append(Strip(round(LEFT + index * width_px, 1), round(width_px, 1), "\n".join((place(middle), *told))))
    return tuple(strips)


def _limit_rules(x: Scale, limits_s: Sequence[float]) -> tuple[Rule, ...]:
    return tuple(Rule(x.pixel(limit_s), f"≤ {wording.short_time(limit_s)}") for limit_s in sorted(limits_s))


def _time_axis(scale: Scale, label: str = "time") -> Axis:
    return Axis(label, _ticks(scale, wording.short_time))


def _ticks(
    scale: Scale, label: Callable[[float], str], whole: bool = False, min_gap_px: float = LABEL_GAP_PX
) -> tuple[Tick, ...]:
    return tuple(Tick(scale.pixel(value), label(value)) for value in ticks(scale, whole, min_gap_px))


def _small_share(value: float) -> str:
    return f"{value * 100:.3g} %"
