"""Curves as SVG: thinned out so that no extreme is lost, with round numbers on the axes.

Units here: data are steps and values; drawing is in the SVG's own pixels, y down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vl_dist.report.html import Html, element, joined

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 12, 28
NUM_BUCKETS = 300  # each keeps its lowest and its highest value: at most 600 points a curve
NUM_MEDIANS = 80  # stretches of which a curve of many points shows the median, over its faint self
LOG_FROM = 30.0  # largest over smallest value from which a logarithmic axis shows more

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Points  # (step, value), by step
    run: int  # number of its run, which gives its colour
    sparse: bool = False  # evaluations: drawn with a dot for each point


@dataclass(frozen=True, slots=True)
class Scale:
    """From data to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def thinned(points: Points, num_buckets: int = NUM_BUCKETS) -> list[tuple[float, float]]:
    """At most two points a bucket, its lowest and its highest in their order; the first and the last point stay."""
    if len(points) <= 2 * num_buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(num_buckets):
        inside = range(len(points) * bucket // num_buckets, len(points) * (bucket + 1) // num_buckets)
        kept.add(min(inside, key=lambda n: points[n][1]))
        kept.add(max(inside, key=lambda n: points[n][1]))
    return [points[n] for n in sorted(kept)]


def medians(points: Points, num_stretches: int = NUM_MEDIANS) -> list[tuple[float, float]]:
    """The middle step of each stretch with the median of its values (the lower of two); of few points, none."""
    if len(points) < 3 * num_stretches:
        return []
    found = []
    for n in range(num_stretches):
        inside = points[len(points) * n // num_stretches : len(points) * (n + 1) // num_stretches]
        middle = (len(inside) - 1) // 2
        found.append((inside[middle][0], sorted(value for _, value in inside)[middle]))
    return found


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    raw = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between `low` and `high`, with 2 and 5 times them where there are few; thinned where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [10.0**power * factor for power in powers for factor in factors]
    inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return inside[:: max(1, math.ceil(len(inside) / 7))]


def chart(curves: Sequence[Curve], description: str, *, may_be_log: bool = False) -> Html:
    """A drawing of curves over steps.

    Args:
        curves: at least one, none empty, all values finite.
        description: for those who cannot see it.
        may_be_log: the value axis is logarithmic where values are far apart.
    """
    values = [value for curve in curves for _, value in curve.points]
    steps = [step for curve in curves for step, _ in curve.points]
    x = Scale(*_apart(min(steps), max(steps)), LEFT, WIDTH - RIGHT)
    y, marks = _value_axis(min(values), max(values), may_be_log=may_be_log)
    grid = [
        joined(
            [
                element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=_px(y(mark)), y2=_px(y(mark))),
                element("text", number(mark), class_="tick", x=LEFT - 7, y=_px(y(mark) + 3.5), text_anchor="end"),
            ]
        )
        for mark in marks
    ]
    below = [
        element("text", number(mark), class_="tick", x=_px(x(mark)), y=HEIGHT - 9, text_anchor="middle")
        for mark in ticks(x.low, x.high, 4)
        if mark == int(mark)
    ]
    return element(
        "svg",
        element("title", description),
        *grid,
        *below,
        element("text", "log", class_="tick", x=LEFT - 12, y=HEIGHT - 9, text_anchor="end") if y.log else None,
        *(_line(curve, x, y) for curve in curves),
        element("line", class_="cursor", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        data_x=f"{x.low:.17g} {x.high:.17g} {x.start} {x.end}",
    )


def number(value: float) -> str:
    """A number as a person writes it: three significant digits at least, thousands parted."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _value_axis(low: float, high: float, *, may_be_log: bool) -> tuple[Scale, list[float]]:
    bottom, top = HEIGHT - BOTTOM, TOP
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        scale = Scale(low / 1.1, high * 1.1, bottom, top, log=True)
        return scale, log_ticks(scale.low, scale.high)
    low, high = _apart(low, high)
    margin = 0.06 * (high - low)
    # What is never negative is not shown as if it could be; what is near zero starts there.
    start = 0.0 if 0 <= low < 0.5 * high else low - margin
    scale = Scale(start, high + margin, bottom, top)
    return scale, ticks(scale.low, scale.high)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Bounds that differ, for an axis of a single value."""
    if high > low and high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    if low == 0:
        return 0.0, 1.0
    half = abs(low) / 10
    return low - half, high + half


def _line(curve: Curve, x: Scale, y: Scale) -> Html:
    points = thinned(curve.points)
    over = [] if curve.sparse else medians(curve.points)
    places = [(_px(x(step)), _px(y(value))) for step, value in points]
    kind = f"run{curve.run % 8} {'sparse' if curve.sparse else 'dense'}"
    shown = " ".join(f"{step:g}:{value:.4g}" for step, value in points)
    drawn = [element("polyline", class_="faint" if over else "line", points=" ".join(f"{a},{b}" for a, b in places))]
    if over:
        through = " ".join(f"{_px(x(step))},{_px(y(value))}" for step, value in over)
        drawn.append(element("polyline", class_="line", points=through))
    if curve.sparse or len(points) == 1:
        drawn += [element("circle", class_="dot", cx=a, cy=b, r=3.2) for a, b in places]
    return element("g", *drawn, class_=kind, data_label=curve.label, data_points=shown)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
