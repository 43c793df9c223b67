"""A request to stop does not wait for a long evaluation: all ranks leave it together, and it is made up for."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.commands import read_rows
from tests.processes import run_ranks, train_main
from vl_dist.evaluate import held_out
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

NUM_STEPS, STOPPED = 4, 85


def words(data: Path, run: Path) -> list[str]:
    return [
        f"shapes.dir={data}", "shapes.num_train=12", "shapes.num_eval=9", f"model.path={data}/model", "run.cpu_threads=1",
        f"data.train={data}/records.jsonl", f"data.eval={data}/eval.jsonl", "data.num_workers=0", "run.self_test=false",
        f"optim.max_steps={NUM_STEPS}", "batch.examples_per_step=4", "eval.max_new_tokens=4", "eval.batch_size=2",
        "eval.every_steps=2", "log.every_steps=3", "checkpoint.every_steps=100", f"run.output_dir={run}",
    ]  # fmt: skip


def train_stopped_while_captioning(arguments: list[str], run: Path, how: str, evaluation: int) -> int:
    """train.py, asked to stop after the first batch of captions of one of its evaluations (on the last rank, by signal)."""
    generate, begun = held_out.generate, []

    def asking(*given: Any, **more: Any) -> Any:
        begun.append(0)
        for n, batch in enumerate(generate(*given, **more)):
            assert n == 0 or len(begun) != evaluation, "goes on although it was to stop"
            if len(begun) == evaluation and how == "file" and os.environ.get("RANK", "0") == "0":
                (run / "STOP").touch()
            if len(begun) == evaluation and how == "signal" and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    held_out.generate = asking
    return train_main(arguments)


def go(data: Path, run: Path, world_size: int, how: str, evaluation: int) -> list[int | None]:
    return run_ranks(
        train_stopped_while_captioning,
        words(data, run),
        run,
        how,
        evaluation,
        world_size=world_size,
        log=run.with_suffix(".log"),
        config_file="cpu.yaml" if world_size > 1 else None,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[tuple[dict[str, Any], list[dict[str, Any]]]]]:
    """An undisturbed run, one that is stopped in each of its three evaluations, and how that one stood at each stop."""
    home = tmp_path_factory.mktemp("stop-in-evaluation")
    data, whole, stopped = home / "data", home / "whole", home / "stopped"
    make_shapes(ShapesConfig(dir=data, num_train=12, num_eval=9))
    assert go(data, whole, 1, "file", 0) == [0], whole.with_suffix(".log").read_text()[-3000:]
    stops = []
    # Each start first makes up for the evaluation that the one before it left, so the next is its second.
    for world_size, how, evaluation in ((2, "file", 1), (2, "signal", 2), (1, "file", 2)):
        codes = go(data, stopped, world_size, how, evaluation)
        assert codes == [STOPPED] * world_size, stopped.with_suffix(".log").read_text()[-3000:]
        metrics = stopped / "metrics.jsonl"
        outcome = json.loads((stopped / "outcome.json").read_text())
        stops.append((outcome, read_rows(metrics)))
        assert (stopped / "checkpoints" / "latest").resolve().name == f"step-{outcome['step']:06d}"
        assert not (stopped / "STOP").exists()
    assert go(data, stopped, 1, "file", 0) == [0], stopped.with_suffix(".log").read_text()[-3000:]
    return whole, stopped, stops


Runs = tuple[Path, Path, list[tuple[dict[str, Any], list[dict[str, Any]]]]]


def test_every_rank_leaves_the_evaluation_and_the_step_has_a_checkpoint(runs: Runs) -> None:
    _, _, stops = runs
    assert [outcome["step"] for outcome, _ in stops] == [0, 2, 4]
    assert {outcome["code"] for outcome, _ in stops} == {STOPPED}
    assert "STOP" in stops[0][0]["reason"] and "another rank" in stops[1][0]["reason"]


def test_the_row_is_without_scores_until_the_run_goes_on(runs: Runs) -> None:
    _, _, stops = runs
    scored = [[row["step"] for row in rows if "eval/cider" in row] for _, rows in stops]
    steps = [[row["step"] for row in rows] for _, rows in stops]
    assert scored == [[], [0], [0, 2]]
    assert steps == [[], [0, 2], [0, 2, 3, 4]]
    assert "train/loss" in stops[1][1][-1], "what was measured since the row before is not lost"


def test_in_the_end_every_evaluation_was_made_with_the_scores_of_a_run_that_never_stopped(runs: Runs) -> None:
    whole, stopped, _ = runs
    expected, found = ([row for row in read_rows(run / "metrics.jsonl") if "eval/loss" in row] for run in (whole, stopped))
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [0, 2, 4]
    for here, there in zip(found, expected, strict=True):
        assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-4)
        assert here["epoch"] == there["epoch"]
    assert {path.name for path in (stopped / "samples").iterdir()} == {f"step-{n:06d}.jsonl" for n in (0, 2, 4)}
    best = [(run / "checkpoints" / "best").resolve().name for run in (whole, stopped)]
    assert best[0] == best[1]
    metadata = json.loads((stopped / "adapter" / "training_metadata.json").read_text())
    assert metadata["scores"]["eval/loss"] == found[-1]["eval/loss"]
