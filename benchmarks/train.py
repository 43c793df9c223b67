"""Training speed beside the tutorial's loop and TRL's SFTTrainer, one feature switched on after the other.

    python -m benchmarks.train --device cpu|cuda [--workload coco|mixed] [--quick] [--out FILE.json]

All ways train on the same photographs and texts (`benchmarks.workloads`). On a CPU the model has the proportions of
Qwen2-VL-2B at a fraction of its width and depth, in float32; on a GPU it is the 2B in bfloat16; weights are random. First
the gradients of all ways are compared; then the ways take turns, round by round, and medians are shown. Loading is inside
the time: the tutorial reads rows that it encoded before, TRL and ours decode and encode images in the training process.
Writes the figures as JSON, and a PNG beside it. TRL is measured where benchmarks/requirements.txt is installed.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser_of, write_json
from benchmarks.measuring import as_rows, best_batch, counts_of, draw, measure, show
from benchmarks.task import Task, Way, differences
from benchmarks.trainers import TrlPeer, Tutorial, no_progress_bars, trl_installed
from benchmarks.workloads import WORKLOADS

TOLERANCE = 1e-4  # relative difference of gradients in float32
ROUGH_TOLERANCE = 5e-2  # in bfloat16
TURN_S = 8.0  # least length of a turn


def ways_of(task: Task) -> list[Way]:
    """Ours: the first in the tutorial's micro-batches, then one feature more each time. A new row is a line here."""
    step, cached = task.workload.examples_per_step, task.caching()
    rows = [
        ("tower under no_grad, logits on targets only; 2 x 2", task.packs_of(2, 2), 4, True),
        (f"and packing; {step} a step", task.planned(), step, True),
        (f"and the last MLP on targets only; {step} a step", task.planned(), step, False),
        (f"and model.feature_cache; {step} a step", task.planned(cached), step, False),
    ]
    if len(task.workload.groups[0]) > 1:
        rows += [
            (f"all but the cache, and data.share_prefix; {step} a step", task.shared(), step, False),
            (f"and model.feature_cache; {step} a step", task.shared(cached), step, False),
        ]
    return [task.way(name, steps, examples_per_step=count, all_rows=all_rows) for name, steps, count, all_rows in rows]


def peers_of(task: Task) -> tuple[list[Way], list[str]]:
    """What pip installs for the same purpose, and a line for each that is not there."""
    if trl_installed():
        return [TrlPeer(task).way()], []
    return [], ["TRL's SFTTrainer was not measured: pip install -r benchmarks/requirements.txt"]


def compare(home: Path, name: str, *, on_gpu: bool, quick: bool, rounds: int | None) -> tuple[list[Any], dict[str, Any]]:
    """The speed of every way, and what must be known of how it was measured.

    Args:
        rounds: instead of the workload's own.
    """
    workload = WORKLOADS[name](home, quick=quick, on_gpu=on_gpu)
    workload = workload if rounds is None else replace(workload, rounds=rounds)
    task = Task(home, workload, on_gpu=on_gpu)
    tutorial = Tutorial(task)
    peers, missing = peers_of(task)
    ways = [tutorial.way(2, 2), *peers, *ways_of(task)]
    apart = differences(ways)
    allowed = TOLERANCE if task.dtype == torch.float32 else ROUGH_TOLERANCE
    assert max(apart) <= allowed, f"gradients differ: {dict(zip((way.name for way in ways), apart, strict=True))}"
    best, tried = best_batch(tutorial, workload.tutorial_batches[:1] if quick else workload.tutorial_batches)
    ways, apart = [ways[0], best, *ways[1:]], [apart[0], apart[0], *apart[1:]]
    counts = counts_of(task)
    turn_s = 0.0 if quick else TURN_S
    speeds = measure(ways, counts, workload.rounds, apart, task.ranks.device, turn_s=turn_s)
    model = "Qwen2-VL-2B's shape" if on_gpu else f"Qwen2-VL-2B's proportions, {workload.model_note}"
    about = {
        "workload": name,
        "counts": counts,
        "rounds": workload.rounds,
        "least_seconds_of_a_turn": turn_s,
        "model": f"{model}, {str(task.dtype).removeprefix('torch.')}, random weights",
        "tutorial_batches_tried": tried,
        "missing": missing,
    }
    return speeds, about


def main() -> None:
    """The command."""
    parser = parser_of("Training speed beside the tutorial's loop and TRL's SFTTrainer.", "train")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="coco")
    parser.add_argument("--rounds", type=int, help="turns of each way that count (default: 3 on a CPU, 5 on a GPU)")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    no_progress_bars()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory).resolve()
        on_gpu = given.device == "cuda"
        speeds, about = compare(home, given.workload, on_gpu=on_gpu, quick=given.quick, rounds=given.rounds)
    write_json(given.out, "train", as_rows(speeds), device=given.device, quick=given.quick, **about)
    draw(speeds, given.out.with_suffix(".png"))
    show(speeds, f"{given.workload} on {given.device}; {about['model']}", about["missing"])
    sys.stdout.write(f"tutorial's batches tried, examples/s: {about['tutorial_batches_tried']}\n")


if __name__ == "__main__":
    main()
