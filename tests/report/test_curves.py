"""Curves: thinned without losing an extreme, on axes with round numbers that hold every point."""

import math
import random
import re

import pytest

from vl_dist.report.curves import HEIGHT, WIDTH, Curve, chart, log_ticks, medians, number, thinned, ticks


def noisy(count: int, seed: int = 0) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(float(step), rng.gauss(0, 1)) for step in range(count)]


def test_thinning_keeps_every_peak_the_ends_and_the_order() -> None:
    points = noisy(10_000)
    points[1234] = (1234.0, 50.0)
    points[1236] = (1236.0, -50.0)
    kept = thinned(points, 300)
    assert len(kept) <= 602
    assert {points[1234], points[1236], points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept) and set(kept) <= set(points)
    for start in range(0, 10_000, 100):  # whatever stretch one looks at, the extremes around it are there
        seen = [value for step, value in kept if start - 40 <= step < start + 140]
        inside = [value for _, value in points[start : start + 100]]
        assert max(seen) >= max(inside) and min(seen) <= min(inside)


def test_few_points_are_all_drawn_without_a_median() -> None:
    points = noisy(200)
    assert thinned(points, 300) == points
    assert medians(points) == []


def test_the_median_of_a_stretch_is_not_moved_by_a_spike() -> None:
    points = [(float(step), 1e9 if step % 10 == 0 else 2.0) for step in range(8000)]
    assert {value for _, value in medians(points, 80)} == {2.0}
    steps = [step for step, _ in medians(points, 80)]
    assert steps == [100.0 * n + 49 for n in range(80)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.19), (-3, 7), (9990, 10_010), (0, 3e-4), (0, 1e9)])
def test_ticks_are_a_few_round_numbers_inside_the_axis(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * abs(low) <= mark <= high + 1e-9 * abs(high) for mark in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_and_between_few_of_them_more() -> None:
    assert log_ticks(0.3, 20) == [0.5, 1, 2, 5, 10, 20]
    found = log_ticks(1e-9, 1e9)
    assert 3 <= len(found) <= 7 and all(math.log10(mark) == round(math.log10(mark)) for mark in found)


@pytest.mark.parametrize(
    "values",
    [[1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 5.0], [1e-8, 1e8], [1e-4, 0.0], [6.4, 0.19]],
    ids=["one", "equal", "zeros", "negative", "logarithmic", "falling to zero", "loss"],
)
def test_every_point_lies_inside_the_drawing(values: list[float]) -> None:
    curve = Curve("", [(float(n), value) for n, value in enumerate(values)], 0, sparse=True)
    drawn = chart([curve], "a curve", may_be_log=True)
    assert (">log<" in drawn) == (min(values) > 0 and max(values) / min(values) > 30)
    assert ">log<" not in chart([curve], "a curve")
    places = re.findall(r'<circle class="dot" cx="([^"]+)" cy="([^"]+)"', drawn)
    assert len(places) == len(values)
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in places)
    heights = [float(y) for _, y in places]
    assert sorted(heights, reverse=True) == [y for _, y in sorted(zip(values, heights, strict=True))], "higher is higher"


def test_numbers_are_written_as_a_person_writes_them() -> None:
    texts = [number(value) for value in (0, 1e-4, 0.0125, 0.5, 41.234, 999.6, 12345.6, 2.5e8, -3.0)]
    assert texts == ["0", "1e-4", "0.0125", "0.5", "41.2", "1000", "12,346", "2.5e8", "-3"]
