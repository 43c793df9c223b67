"""How ways are timed and shown."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.evaluating import PARTS, timed_parts
from benchmarks.measuring import draw, measure
from benchmarks.starting import _stages
from benchmarks.task import Way, differences
from vl_dist.evaluate import held_out

COUNTS = {"examples": 10, "images": 20, "target_tokens": 30, "tokens": 1000}


def way(name: str, called: list[str], seconds: float, gradient: float = 1.0) -> Way:
    def begin() -> Callable[[], None]:
        time.sleep(0.5)  # not timed
        return lambda: (called.append(name), time.sleep(seconds))[1]

    return Way(name, begin, lambda: {"a": torch.tensor([gradient, 2.0])}, examples_per_step=2)


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []
    ways = [way("slow", called, 0.04), way("fast", called, 0.01)]
    slow, fast = measure(ways, COUNTS, 3, [0.0, 0.0], torch.device("cpu"))
    assert called == ["slow", "fast"] * 4
    assert 25 < slow.examples_per_s <= 250, "what comes before the training is not timed"
    assert slow.examples_per_s < fast.examples_per_s <= 1000
    assert slow.times_tutorial == pytest.approx(1.0) and fast.times_tutorial > 1
    assert fast.slowest <= fast.examples_per_s <= fast.fastest
    assert fast.images_per_s == pytest.approx(2 * fast.examples_per_s)
    assert fast.tokens_per_s == pytest.approx(100 * fast.examples_per_s)


def test_a_turn_goes_over_the_examples_until_it_is_long_enough_and_gives_the_mean() -> None:
    called: list[str] = []
    ways = [way("slow", called, 0.2), way("fast", called, 0.01)]
    slow, fast = measure(ways, COUNTS, 1, [0.0, 0.0], torch.device("cpu"), turn_s=0.1)
    assert called[:3] == ["slow", "fast", "slow"] and called[3:] == ["fast"] * len(called[3:])
    assert 2 <= len(called[3:]) <= 10
    assert slow.examples_per_s <= 50 < fast.examples_per_s <= 1000


def test_gradients_are_compared_relative_to_the_largest_entry() -> None:
    ways = [way("one", [], 0), way("other", [], 0, gradient=1.5)]
    assert differences(ways) == [0.0, pytest.approx(0.25)]


def test_the_plot_has_a_bar_for_each_way(tmp_path: Path) -> None:
    ways = [way("slow", [], 0.02), way("fast", [], 0.01)]
    draw(measure(ways, COUNTS, 1, [0.0, 0.0], torch.device("cpu")), tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        widths = [sum(image.getpixel((x, 46 + 50 * n)) == (70, 130, 180) for x in range(900)) for n in range(2)]
    assert 250 < widths[0] < 500 < 690 < widths[1]


def test_parts_of_an_evaluation_are_functions_that_it_calls() -> None:
    from collections import Counter

    seconds: Counter[str] = Counter()
    with timed_parts(seconds):
        held_out.score_captions(["a b"], [["a b"]])
    assert set(seconds) == {"scores"} and seconds["scores"] > 0
    assert all(hasattr(module, function) for module, function, _ in PARTS)


def test_stages_are_the_first_lines_after_pauses() -> None:
    seen = {"one": 3.0, "two": 3.01, "three": 4.0, "four": 4.05}
    assert _stages(seen) == ((3.0, "one"), (4.0, "three"))
