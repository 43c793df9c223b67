"""Size and time of a report: `python -m benchmarks.report [--quick] [--out FILE.json]`.

A run of 10,000 logged steps with an evaluation every 500, without images. Bounds: 5 MB and 5 s.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import judge, parser_of, spread, write_json
from vl_dist.config import dump, load
from vl_dist.report.page import page
from vl_dist.report.read import read_runs
from vl_dist.run.files import METRICS

BOUND_MB, BOUND_S = 5.0, 5.0
SCORES = ("loss", "cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "exact_match")
EVALUATED_EVERY = 500


def make_run(directory: Path, num_rows: int) -> None:
    """An output directory whose curves look like training's."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(load(None, [f"run.output_dir={directory}"])))
    with (directory / METRICS).open("w") as file:
        for step in range(1, num_rows + 1):
            file.write(json.dumps(_row(step, num_rows, rng)) + "\n")


def _row(step: int, num_rows: int, rng: np.random.Generator) -> dict[str, Any]:
    speed = 40 + 3 * float(rng.standard_normal())
    row: dict[str, Any] = {
        "step": step,
        "epoch": 2 * step / num_rows,
        "train/lr": 1e-4 * (1 - step / num_rows),
        "train/loss": 0.4 + 5 * math.exp(-6 * step / num_rows) * (1 + 0.15 * float(rng.standard_normal())),
        "train/grad_norm": float(rng.lognormal(0, 0.6)),
        "train/target_tokens": int(rng.integers(200, 400)),
        "perf/examples_per_s": speed,
        "perf/images_per_s": speed,
        "perf/target_tokens_per_s": 15 * speed,
        "perf/tokens_per_s": 120 * speed,
        "perf/patches_per_s": 400 * speed,
        "perf/mfu": 0.4 + 0.01 * float(rng.standard_normal()),
        "perf/padding": float(rng.random()) * 0.05,
        "perf/data_wait_s": float(rng.exponential(0.01)),
        "perf/peak_memory_gib": 9.8,
    }
    scores = {f"eval/{name}": float(rng.random()) for name in SCORES}
    return row | (scores if step % EVALUATED_EVERY == 0 else {})


def main() -> None:
    """The command."""
    given = parser_of("Size and time of a report.", "report").parse_args()
    num_rows, rounds = (500, 1) if given.quick else (10_000, 5)
    seconds, megabytes = [], 0.0
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        make_run(run, num_rows)
        for _ in range(rounds):
            started = time.perf_counter()
            html = page(read_runs([run]), num_images=0)
            (run / "report.html").write_text(html)
            seconds.append(time.perf_counter() - started)
            megabytes = len(html.encode()) / 1e6
    times = spread(seconds)
    write_json(given.out, "report", {"seconds": times, "megabytes": megabytes}, quick=given.quick, rows=num_rows)
    table = Table("report", "median", "bound", title=f"{num_rows:,} rows, no images")
    table.add_row("seconds, reading and writing included", f"{times['median']:.2f}", judge(times["median"], BOUND_S))
    table.add_row("MB", f"{megabytes:.2f}", judge(megabytes, BOUND_MB))
    Console().print(table)


if __name__ == "__main__":
    main()
