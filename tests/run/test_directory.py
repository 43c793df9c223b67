"""What a new start does with an output directory that is not empty."""

import json
from pathlib import Path

import pytest

from vl_dist.config import dump, load
from vl_dist.errors import UserError
from vl_dist.run.directory import begin, inspect
from vl_dist.run.outcome import Ending, Outcome
from vl_dist.settings import Config


def settings(directory: Path, *words: str) -> Config:
    return load(None, [f"run.output_dir={directory}", *words])


def earlier_run(directory: Path, *, progress: bool) -> None:
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(settings(directory)))
    (directory / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1.0}\n' if progress else '{"step": 0}\n')


@pytest.mark.parametrize("leftover", [None, "outcome.json", "STOP"])
def test_a_new_directory_begins_at_step_zero(tmp_path: Path, leftover: str | None) -> None:
    if leftover:
        (tmp_path / leftover).touch()
    start = inspect(settings(tmp_path))
    assert (start.finished, start.checkpoint, start.changed) == (False, None, ())


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        inspect(settings(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        inspect(settings(tmp_path / "thesis.tex"))


def test_settings_that_shape_training_may_not_change_unless_forced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    earlier_run(run, progress=True)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.0001 -> 0\.5"):
        inspect(settings(run, "optim.lr=0.5"))
    forced = inspect(settings(run, "optim.lr=0.5", "run.allow_changes=true"))
    assert "optim.lr" in [change.path for change in forced.changed]
    harmless = inspect(settings(run, "log.every_steps=1"))
    assert [change.path for change in harmless.changed] == ["log.every_steps"]


def test_a_run_that_never_trained_binds_nobody(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", progress=False)
    assert inspect(settings(tmp_path / "run", "optim.lr=0.5")).checkpoint is None


def test_a_finished_run_is_finished_until_it_is_replaced_on_request(tmp_path: Path) -> None:
    run = tmp_path / "run"
    earlier_run(run, progress=True)
    (run / "adapter").mkdir()
    (run / "adapter" / "training_metadata.json").write_text("{}")
    assert inspect(settings(run)).finished
    anew = settings(run, "run.resume=never")
    start = inspect(anew)
    assert not start.finished
    begin(anew, start)
    assert {path.name for path in run.iterdir()} == {"config.yaml"}


class UnforeseenError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "code", "passes_on"),
    [(UserError("do this"), 2, False), (KeyboardInterrupt(), 85, False), (UnforeseenError("boom"), 1, True)],
)
def test_every_end_is_written_down_and_only_bugs_keep_their_traceback(
    tmp_path: Path, error: BaseException, code: int, passes_on: bool
) -> None:
    (tmp_path / "outcome.json").write_text("an earlier one")
    ending = Ending(tmp_path, is_main=True)
    caught: BaseException | None = None
    try:
        with ending:
            assert not (tmp_path / "outcome.json").exists()
            raise error
    except UnforeseenError as unforeseen:
        caught = unforeseen
    assert (caught is not None) == passes_on
    written = json.loads((tmp_path / "outcome.json").read_text())
    assert (written["code"], written["step"], ending.outcome.code) == (code, 0, code)


def test_an_orderly_end_is_what_the_run_says(tmp_path: Path) -> None:
    with Ending(tmp_path / "new", is_main=True) as ending:
        ending.outcome = Outcome(0, "finished", 12)
    assert json.loads((tmp_path / "new" / "outcome.json").read_text()) == {"code": 0, "reason": "finished", "step": 12}
