"""A run that keeps its best checkpoint and makes the adapter of it."""

import json
import sys
from pathlib import Path

from tests.commands import read_rows, run_command
from vl_dist.adapter.load import load


def test_the_best_checkpoint_stays_and_becomes_the_adapter(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    words = [
        f"shapes.dir={data}",
        "shapes.num_train=12",
        "shapes.num_eval=4",
        f"model.path={data}/model",
        f"data.train={data}/records.jsonl",
        f"data.eval={data}/eval.jsonl",
        f"eval.cider_corpus={data}/records.jsonl",
        "batch.examples_per_step=8",
        "optim.max_steps=24",
        "optim.schedule=constant",
        "optim.lr=2e-2",  # learns, and goes astray
        "checkpoint.every_steps=100",
        "checkpoint.keep=2",
        "eval.every_steps=3",
        "eval.best_metric=loss",
        "run.final=best",
        f"run.output_dir={run}",
    ]
    ended = run_command(sys.executable, "train.py", *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = {row["step"]: row for row in read_rows(run / "metrics.jsonl") if "eval/loss" in row}
    assert list(rows) == list(range(0, 25, 3))
    best_step = min((step for step in rows if step > 0), key=lambda step: rows[step]["eval/loss"])
    assert best_step < 24, "the last step is the best: the test is too easy"
    best = run / "checkpoints" / "best"
    assert best.resolve().name == f"step-{best_step:06d}"
    exported = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert exported == (best / "adapter_model.safetensors").read_bytes()
    assert exported != (run / "checkpoints" / "latest" / "adapter_model.safetensors").read_bytes()
    metadata = json.loads((run / "adapter" / "training_metadata.json").read_text())
    assert metadata["step"] == best_step
    assert metadata["scores"] == {name: value for name, value in rows[best_step].items() if name.startswith("eval/")}
    load(run / "adapter", base_dir=None)  # its probe is the best checkpoint's, not the model's as training left it
    # Another wish for a finished run: the adapter is made anew, and nothing is trained.
    metrics = (run / "metrics.jsonl").read_bytes()
    again = run_command(sys.executable, "train.py", *words, "run.final=last")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (run / "metrics.jsonl").read_bytes() == metrics
    exported = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert exported == (run / "checkpoints" / "latest" / "adapter_model.safetensors").read_bytes()
