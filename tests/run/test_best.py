"""The best checkpoint: what it points to follows from the rows and the checkpoints that are there."""

import json
from pathlib import Path
from typing import Any

import pytest

from vl_dist.errors import UserError
from vl_dist.run.best import BestCheckpoint, Final, choose_final


def made(directory: Path, rows: list[dict[str, Any]], *, checkpoints: list[int]) -> Path:
    for step in checkpoints:
        (directory / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def best(directory: Path, metric: str = "cider") -> BestCheckpoint:
    return BestCheckpoint(directory, metric, is_main=True)


def pointed(directory: Path) -> str:
    return (directory / "checkpoints" / "best").readlink().name


def test_a_row_is_the_best_if_it_beats_all_before_but_not_before_training(tmp_path: Path) -> None:
    keeper = best(made(tmp_path, [], checkpoints=[2, 4]))
    assert not keeper.improves({"step": 0, "eval/cider": 9.0})
    assert not keeper.improves({"step": 1, "train/loss": 1.0})
    assert not keeper.improves({"step": 1, "eval/cider": float("nan")})
    keeper.move({"step": 2, "eval/cider": 1.0})
    assert pointed(tmp_path) == "step-000002"
    assert not keeper.improves({"step": 3, "eval/cider": 1.0})
    assert keeper.improves({"step": 4, "eval/cider": 1.1})
    keeper.move({"step": 4, "eval/cider": 1.1})
    assert pointed(tmp_path) == "step-000004"


def test_of_losses_the_lower_is_better(tmp_path: Path) -> None:
    keeper = best(made(tmp_path, [{"step": 2, "eval/loss": 1.0}], checkpoints=[2]), "loss")
    assert keeper.improves({"step": 4, "eval/loss": 0.9})
    assert not keeper.improves({"step": 4, "eval/loss": 1.1})


def test_a_resumed_run_knows_the_best_so_far_and_mends_the_pointer(tmp_path: Path) -> None:
    """Killed after the checkpoint of step 4 was whole and before the pointer moved; step 6 has no checkpoint any more."""
    rows = [{"step": step, "eval/cider": score} for step, score in ((0, 9.0), (2, 1.0), (4, 2.0), (6, 3.0), (8, 1.5))]
    made(tmp_path, rows, checkpoints=[2, 4, 8])
    (tmp_path / "checkpoints" / "best").symlink_to("step-000002")
    keeper = best(tmp_path)
    assert pointed(tmp_path) == "step-000004"
    assert not keeper.improves({"step": 9, "eval/cider": 1.9})
    assert keeper.improves({"step": 9, "eval/cider": 2.1})


def test_a_pointer_to_a_step_that_training_has_yet_to_repeat_is_removed(tmp_path: Path) -> None:
    made(tmp_path, [{"step": 0, "eval/cider": 1.0}], checkpoints=[8])
    (tmp_path / "checkpoints" / "best").symlink_to("step-000008")
    best(tmp_path)
    assert not (tmp_path / "checkpoints" / "best").is_symlink()


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    made(tmp_path, [{"step": 2, "eval/cider": 1.0}], checkpoints=[2])
    other = BestCheckpoint(tmp_path, "cider", is_main=False)
    assert not other.improves({"step": 4, "eval/cider": 5.0})
    other.move({"step": 4, "eval/cider": 5.0})
    assert not (tmp_path / "checkpoints" / "best").is_symlink()


def test_the_last_step_is_exported_with_its_own_scores_and_a_missing_best_is_said(tmp_path: Path) -> None:
    made(tmp_path, [{"step": 2, "eval/cider": 3.0}, {"step": 4, "eval/cider": 1.0}], checkpoints=[2])
    assert choose_final(tmp_path, "last", last_step=4) == Final(None, 4, {"eval/cider": 1.0})
    with pytest.raises(UserError, match=r"run\.final"):
        choose_final(tmp_path, "best", last_step=4)
    best(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        choose_final(tmp_path, "best", last_step=4)
