"""Output directories of runs, made in the formats that train.py writes, from a few numbers."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vl_dist.config import dump, load
from vl_dist.evaluate.held_out import Sample, write_samples
from vl_dist.run.outcome import Outcome

HOSTILE = "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title='taken over'\"> & \"quoted\""

FINISHED = Outcome(0, "finished", 50)


def make_run(
    directory: Path,
    *,
    num_rows: int = 50,
    evaluations: tuple[int, ...] = (0, 20, 40, 50),
    num_images: int = 6,
    words: tuple[str, ...] = (),
    outcome: Outcome | None = FINISHED,
    seed: int = 0,
) -> Path:
    """A run whose loss falls and whose captions become right; one caption is hostile markup.

    Args:
        num_rows: logged steps after step 0.
        evaluations: steps with scores and samples.
        num_images: held-out images; 0: no samples, as where nothing is held out.
        words: settings beside the defaults.
        outcome: None: the run is under way.
    """
    images = directory.parent / "images"
    directory.mkdir(parents=True)
    _draw(images, num_images)
    config = load(None, [f"data.train={images.parent}/records.jsonl", f"data.image_root={images}", *words])
    (directory / "config.yaml").write_text(dump(config))
    rng = np.random.default_rng(seed)
    rows = [_row(step, num_rows, rng) for step in range(1, num_rows + 1)]
    rows = [{"step": 0, "epoch": 0.0}, *rows]
    for step in evaluations:
        part = step / max(1, num_rows)
        rows[step] |= _scores(part)
        if num_images:
            write_samples(directory / "samples", step, [_sample(n, part) for n in range(num_images)])
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if len(row) > 2))
    if outcome is not None:
        (directory / "outcome.json").write_text(json.dumps(asdict(outcome)) + "\n")
    return directory


def _row(step: int, num_rows: int, rng: np.random.Generator) -> dict[str, Any]:
    speed = 40 + 3 * rng.standard_normal()
    return {
        "step": step,
        "epoch": step / num_rows * 2,
        "train/lr": 1e-4 * (1 - step / num_rows),
        "train/loss": 0.4 + 5 * math.exp(-6 * step / num_rows) * (1 + 0.15 * rng.standard_normal()),
        "train/grad_norm": float(rng.lognormal(0, 0.6)),
        "train/target_tokens": 300,
        "perf/examples_per_s": speed,
        "perf/images_per_s": speed,
        "perf/target_tokens_per_s": 15 * speed,
        "perf/tokens_per_s": 120 * speed,
        "perf/patches_per_s": 400 * speed,
        "perf/mfu": None,
        "perf/padding": 0.02,
        "perf/data_wait_s": float(rng.exponential(0.01)),
        "perf/peak_memory_gib": 9.8,
    }


def _scores(part: float) -> dict[str, float]:
    names = {"cider": 7.0, "bleu1": 0.9, "bleu2": 0.8, "bleu3": 0.7, "bleu4": 0.6, "rouge_l": 0.8, "exact_match": 0.7}
    return {"eval/loss": 5.5 - 5 * part} | {f"eval/{name}": most * part for name, most in names.items()}


def _sample(number: int, part: float) -> Sample:
    truth = f"A circle of colour number {number} on a plain ground."
    learnt = truth.split()[: round(len(truth.split()) * part)]
    said = HOSTILE if number == 1 else " ".join(learnt)
    references = (truth, f"There is a round shape, number {number}.", "A circle.", "One circle on one ground.")
    score = 10 * part * (1 - number / 20)
    return Sample(f"circle-{number}", (f"{number}.png",), references, said, said in references, score)


def _draw(directory: Path, count: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        image = Image.new("RGB", (400, 280), (235, 230, 220))
        ImageDraw.Draw(image).ellipse((60 + 20 * n, 60, 200 + 20 * n, 200), fill=(40 * n % 256, 120, 255 - 30 * n % 256))
        image.save(directory / f"{n}.png")
