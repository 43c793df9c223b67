"""Ways timed in turns, and the figures as a table and as bars."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from benchmarks.common import PeakMemory, spread
from benchmarks.task import Task, Way
from benchmarks.trainers import Tutorial


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of one way. Rates are of what the data holds: padding and images encoded again do not count."""

    name: str
    examples_per_s: float  # median over rounds
    slowest: float  # examples/s of the slowest round
    fastest: float
    times_tutorial: float  # median over rounds of the ratio within a round to the tutorial's loop as written
    images_per_s: float  # as the examples show them
    target_tokens_per_s: float
    tokens_per_s: float  # language-model tokens of the examples one by one
    peak_memory_gib: float | None  # most that one round added; None: not known
    gradient_difference: float
    examples_per_step: int
    notes: str


def counts_of(task: Task) -> dict[str, int]:
    """What one round trains on."""
    lengths = task.lengths
    return {
        "examples": len(lengths),
        "images": int(lengths.images.sum()),
        "target_tokens": int(lengths.targets.sum()),
        "tokens": int(lengths.tokens.sum()),
        "shortest": int(lengths.tokens.min()),
        "longest": int(lengths.tokens.max()),
    }


def seconds_of(way: Way, at_least_s: float = 0.0) -> float:
    """All examples once: the mean of as many passes as take so long, for the first steps after another way are slower."""
    train = way.begin()
    started, passes, taken = time.perf_counter(), 0, 0.0
    while passes == 0 or taken < at_least_s:
        train()
        passes, taken = passes + 1, time.perf_counter() - started
    return taken / passes


def best_batch(tutorial: Tutorial, batches: Sequence[int]) -> tuple[Way, dict[str, float | None]]:
    """The tutorial's loop at its fastest micro-batch without accumulation, and examples/s of those that were tried.

    Each was run once, after one run of the loop that does not count; None: it did not fit into memory.
    """
    found: dict[int, float] = {}
    tried: dict[str, float | None] = {}
    for batch in batches:
        way = tutorial.way(batch, 1)
        try:
            if batch == batches[0] or torch.cuda.is_available():  # there, each size has kernels of its own to choose
                seconds_of(way)
            found[batch] = len(tutorial.rows) / seconds_of(way)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        tried[str(batch)] = round(found[batch], 3) if batch in found else None
    return tutorial.way(max(found, key=found.__getitem__), 1), tried


def measure(
    ways: Sequence[Way],
    counts: Mapping[str, int],
    rounds: int,
    apart: Sequence[float],
    device: torch.device,
    *,
    turn_s: float = 0.0,
) -> list[Speed]:
    """All ways in turn, `rounds` times, after one round that does not count; in that round memory is looked at.

    Args:
        turn_s: a turn goes over the examples until it has lasted so long.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    peaks: list[float | None] = []
    for n in range(rounds + 1):
        for way, taken in zip(ways, seconds, strict=True):
            if n:
                taken.append(seconds_of(way, turn_s))
                continue
            with PeakMemory(device) as memory:
                seconds_of(way)
            peaks.append(memory.gib)
    return [
        _speed(way, counts, taken, seconds[0], peak, difference)
        for way, taken, peak, difference in zip(ways, seconds, peaks, apart, strict=True)
    ]


def _speed(
    way: Way,
    counts: Mapping[str, int],
    seconds: Sequence[float],
    tutorial_seconds: Sequence[float],
    peak: float | None,
    difference: float,
) -> Speed:
    rates = spread([counts["examples"] / taken for taken in seconds])
    per_example = rates["median"] / counts["examples"]
    ratios = [base / own for own, base in zip(seconds, tutorial_seconds, strict=True)]
    return Speed(
        name=way.name,
        examples_per_s=rates["median"],
        slowest=rates["least"],
        fastest=rates["most"],
        times_tutorial=spread(ratios)["median"],
        images_per_s=per_example * counts["images"],
        target_tokens_per_s=per_example * counts["target_tokens"],
        tokens_per_s=per_example * counts["tokens"],
        peak_memory_gib=peak,
        gradient_difference=difference,
        examples_per_step=way.examples_per_step,
        notes=way.notes,
    )


def as_rows(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(speed) for speed in speeds]


def show(speeds: Sequence[Speed], title: str, missing: Sequence[str]) -> None:
    """The table, with a row for what is missing."""
    columns = ("examples/s", "slowest to fastest", "times the tutorial's", "images/s", "targets/s", "tokens/s", "peak GiB")
    table = Table("way", *columns, "gradient off by", title=title)
    for speed in speeds:
        table.add_row(
            speed.name,
            f"{speed.examples_per_s:.2f}",
            f"{speed.slowest:.2f} to {speed.fastest:.2f}",
            f"{speed.times_tutorial:.2f}",
            f"{speed.images_per_s:.2f}",
            f"{speed.target_tokens_per_s:.0f}",
            f"{speed.tokens_per_s:.0f}",
            "" if speed.peak_memory_gib is None else f"{speed.peak_memory_gib:.2f}",
            f"{speed.gradient_difference:.0e}",
        )
    for line in missing:
        table.add_row(line)
    console = Console(width=160)
    console.print(table)
    for speed in speeds:
        if speed.notes:
            console.print(f"{speed.name}: {speed.notes}", highlight=False)


def draw(speeds: Sequence[Speed], path: Path) -> None:
    """Bars of examples a second."""
    image = Image.new("RGB", (900, 40 + 50 * len(speeds)), "white")
    pen = ImageDraw.Draw(image)
    fastest = max(speed.examples_per_s for speed in speeds)
    for n, speed in enumerate(speeds):
        top = 20 + 50 * n
        pen.text((10, top), speed.name, fill="black")
        pen.rectangle((10, top + 16, 10 + 700 * speed.examples_per_s / fastest, top + 36), fill="steelblue")
        pen.text((730, top + 20), f"{speed.examples_per_s:.2f} examples/s, {speed.times_tutorial:.1f}x", fill="black")
    image.save(path)
