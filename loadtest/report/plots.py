"""From numbers to what an SVG needs: scales, ticks, paths in pixels. Pure; knows neither runs nor templates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadtest.measured import Floats
from loadtest.report.curves import Curve

_MAX_TICKS = 7
LABEL_GAP_PX = 46.0  # between ticks side by side: the width of a label
_LINEAR_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# Digits of the ticks in each decade of a logarithmic axis; the densest that fits is taken.
_LOG_DIGITS = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to pixels from start to end, evenly in the value or in its logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    is_log: bool = False

    def pixels(self, values: Floats) -> Floats:
        """Where values lie; those beyond the ends lie at the ends."""
        inside = np.clip(values, self.low, self.high)
        if self.is_log:
            share = np.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)

    def pixel(self, value: float) -> float:
        """Where one value lies."""
        return round(float(self.pixels(np.array([value]))[0]), 1)

    def value(self, pixel: float) -> float:
        """The value that lies at a pixel."""
        share = (pixel - self.start_px) / (self.end_px - self.start_px)
        if self.is_log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Whether the value lies between the ends."""
        return self.low <= value <= self.high


def log_scale(low: float, high: float, start_px: float, end_px: float) -> Scale:
    """A logarithmic scale around [low, high], both above 0, with a little room at either end."""
    if not 0 < low <= high:
        raise ValueError(f"a logarithmic scale cannot span {low} to {high}")
    room = max((high / low) ** 0.03, 1.1)
    return Scale(low / room, high * room, start_px, end_px, is_log=True)


def linear_scale(high: float, start_px: float, end_px: float) -> Scale:
    """A linear scale from 0 to a round number that is at least `high`."""
    step = _linear_step(high if high > 0 else 1.0)
    return Scale(0.0, max(step, math.ceil(high / step - 1e-9) * step), start_px, end_px)


def ticks(scale: Scale, whole: bool = False, min_gap_px: float = LABEL_GAP_PX) -> tuple[float, ...]:
    """Round values on the scale, at most seven; only whole numbers if asked for.

    On a logarithmic scale no two are nearer than `min_gap_px`.
    """
    if scale.is_log:
        return _log_ticks(scale, min_gap_px)
    step = _linear_step(scale.high)
    step = max(1.0, math.ceil(step)) if whole else step
    return tuple(step * index for index in range(math.floor(scale.high / step + 1e-9) + 1))


def step_path(curve: Curve, x: Scale, y: Scale) -> str:
    """The `d` of an SVG path that draws a step function from the left end of the plot to its last point."""
    across, up = _strings(x.pixels(curve.x)), _strings(y.pixels(curve.y))
    parts = [f"M{x.start_px:g} {y.pixel(curve.before):g}"]
    last = ("", "")
    for point in zip(across, up, strict=True):
        if point != last:
            parts.append(f"H{point[0]}V{point[1]}")
            last = point
    return "".join(parts)


def line_path(xs: Floats, ys: Floats, x: Scale, y: Scale) -> str:
    """The `d` of an SVG path through points."""
    points = zip(_strings(x.pixels(xs)), _strings(y.pixels(ys)), strict=True)
    return "M" + "L".join(f"{across} {up}" for across, up in points)


def _strings(pixels: Floats) -> list[str]:
    return [f"{pixel:.1f}".removesuffix(".0") for pixel in pixels.tolist()]


def _linear_step(high: float) -> float:
    power = 10.0 ** math.floor(math.log10(high / (_MAX_TICKS - 1)))
    return next(step * power for step in _LINEAR_STEPS if high / (step * power) <= _MAX_TICKS - 1 + 1e-9)


def _log_ticks(scale: Scale, min_gap_px: float) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    for digits in _LOG_DIGITS:
        found = tuple(value for power in decades for digit in digits if scale.holds(value := _power(digit, power)))
        if len(found) < 2:
            return _ticks_within(scale)
        if _fit(found, scale, min_gap_px):
            return found
    stride = next(stride for stride in range(2, len(found) + 1) if _fit(found[::stride], scale, min_gap_px))
    return found[::stride]


def _ticks_within(scale: Scale) -> tuple[float, ...]:
    """Multiples of a round step, where a logarithmic scale is too narrow for round digits."""
    step = _linear_step(scale.high - scale.low)
    return tuple(step * index for index in range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1))


def _fit(values: tuple[float, ...], scale: Scale, min_gap_px: float) -> bool:
    gaps_px = np.abs(np.diff(scale.pixels(np.array(values))))
    return len(values) <= _MAX_TICKS and bool((gaps_px >= min_gap_px).all())


def _power(digit: float, power: int) -> float:
    """`digit` × 10^power as the float that a reader would type: 0.05, not 0.050000000000000003."""
    return float(f"{digit}e{power}")
