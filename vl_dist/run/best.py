"""The best checkpoint: which evaluated step is best so far, the pointer `checkpoints/best`, and what `adapter/` is made of.

Which step is best is not stored anywhere: it follows from metrics.jsonl and the checkpoints that are there, so that no kill
can leave the two apart.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_dist.errors import UserError
from vl_dist.run.checkpoint import damage, point
from vl_dist.run.files import METADATA
from vl_dist.run.metrics import read_metrics, scores_of

LOWER_IS_BETTER = ("loss",)


class BestCheckpoint:
    """Keeps `checkpoints/best` on the best evaluated step. Does nothing on ranks other than 0."""

    def __init__(self, directory: Path, metric: str, *, is_main: bool) -> None:
        """
        Args:
            directory: the run's output directory, with rows beyond the step that training goes on from cut already.
            metric: as `eval.best_metric` names it.
        """
        self._root = directory / "checkpoints"
        self._metric = metric
        self._is_main = is_main
        self._score = -math.inf
        if not is_main:
            return
        best_step = None
        for row in read_metrics(directory):
            if self.improves(row) and (self._root / _name(row["step"])).is_dir():
                best_step, self._score = row["step"], self._goodness(row)
        if best_step is not None:
            point(self._root / "best", _name(best_step))
        else:
            (self._root / "best").unlink(missing_ok=True)

    def improves(self, row: dict[str, Any]) -> bool:
        """Whether a row of metrics.jsonl has a better score than every one before; never before the first step."""
        return self._is_main and row["step"] > 0 and self._goodness(row) > self._score

    def move(self, row: dict[str, Any]) -> Path:
        """Points to the checkpoint of an evaluated step, which must be whole on disk, and returns it."""
        checkpoint = self._root / _name(row["step"])
        if self._is_main:
            assert checkpoint.is_dir(), "the best step has a checkpoint"
            self._score = self._goodness(row)
            point(self._root / "best", checkpoint.name)
        return checkpoint

    def _goodness(self, row: dict[str, Any]) -> float:
        """Higher is better; what is no number is worse than anything."""
        value = row.get(f"eval/{self._metric}")
        if value is None or not math.isfinite(value):
            return -math.inf
        return -float(value) if self._metric in LOWER_IS_BETTER else float(value)


@dataclass(frozen=True, slots=True)
class Final:
    """What `adapter/` is made of."""

    checkpoint: Path | None  # its weights; None: those of the model as it stands
    step: int  # optimizer steps done
    scores: dict[str, float]  # of the evaluation at that step


def choose_final(directory: Path, which: str, *, last_step: int) -> Final:
    """What a finished run exports: its last step, or the checkpoint that `best` points to. Main process only.

    Args:
        directory: the run's output directory.
        which: `run.final`.
        last_step: optimizer steps done.

    Raises:
        UserError: the best is wanted and there is none, or it is damaged.
    """
    rows = {row["step"]: scores for row in read_metrics(directory) if (scores := scores_of(row))}
    if which == "last":
        return Final(None, last_step, rows.get(last_step, {}))
    best = (directory / "checkpoints" / "best").resolve()
    reason = "no evaluated checkpoint is there" if best.name == "best" else damage(best)
    if reason is not None:
        raise UserError(f"run.final is best, but {best} cannot be used: {reason}. Set run.final=last and start again.")
    step = int(best.name.removeprefix("step-"))
    return Final(best, step, rows[step])


def newest_adapter(directory: Path, *, finished: bool) -> tuple[Path, int, tuple[str, ...]]:
    """The adapter of a run that ended in order: where it is, of which step, and its names. Main process only.

    Args:
        directory: the run's output directory.
        finished: `adapter/` was exported; else the latest checkpoint has it.
    """
    if finished:
        adapter = directory / "adapter"
        step = int(json.loads((adapter / METADATA).read_text())["step"])
    else:
        adapter = (directory / "checkpoints" / "latest").resolve()
        step = int(adapter.name.removeprefix("step-"))
    is_best = (directory / "checkpoints" / "best").resolve().name == _name(step)
    return adapter, step, ("latest", "best") if is_best else ("latest",)


def _name(step: int) -> str:
    return f"step-{step:06d}"
