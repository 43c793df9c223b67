"""The output directory: what is in it already, and what a new start does with that."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from vl_dist.config import Change, changes, dump, load
from vl_dist.errors import UserError
from vl_dist.run.checkpoint import Skipped, damage, find_checkpoint
from vl_dist.run.files import CONFIG, LEDGER, METADATA, METRICS, OUTCOME, TENSORBOARD
from vl_dist.run.interrupt import STOP_FILE
from vl_dist.settings import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a run begins in its output directory."""

    finished: bool = False
    checkpoint: Path | None = None  # go on from here; None: from step 0
    changed: tuple[Change, ...] = ()  # against the run that is there
    skipped: tuple[Skipped, ...] = ()  # damaged checkpoints newer than `checkpoint`


def inspect(config: Config) -> Start:
    """Decides how the run begins. Changes nothing on disk.

    Raises:
        UserError: the directory holds something else, or a run with other settings.
    """
    directory = config.run.output_dir
    reason = obstacle(directory)
    if reason is not None:
        raise UserError(f"run.output_dir is {directory}, but {reason}. Give a new or an empty directory.")
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if CONFIG not in there:
        strange = sorted(there - {OUTCOME, STOP_FILE})
        if strange:
            raise UserError(
                f"run.output_dir {directory} holds {strange[0]!r} and no {CONFIG}: it is not a run's. "
                "Give a new or an empty directory."
            )
        return Start(checkpoint=_asked_checkpoint(config))
    changed = tuple(changes(load(directory / CONFIG), config))
    trains = [change for change in changed if change.trains]
    if trains and _has_progress(directory) and not config.run.allow_changes:
        raise UserError(_refusal(directory, trains))
    finished = (directory / "adapter" / METADATA).is_file()
    if config.run.resume == "never":
        return Start(changed=changed)
    if finished and not trains and not any(change.path == "run.final" for change in changed):
        return Start(finished=True, changed=changed)
    if config.run.resume != "auto":
        return Start(checkpoint=_asked_checkpoint(config), changed=changed)
    checkpoint, skipped = find_checkpoint(directory / "checkpoints")
    return Start(checkpoint=checkpoint, changed=changed, skipped=tuple(skipped))


def obstacle(directory: Path) -> str | None:
    """Why a directory cannot be made or written; None if it can."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK) else f"{nearest} cannot be written"


def _asked_checkpoint(config: Config) -> Path | None:
    if config.run.resume in ("auto", "never"):
        return None
    checkpoint = Path(config.run.resume)
    reason = damage(checkpoint)
    if reason is not None:
        raise UserError(f"run.resume is {checkpoint}, which cannot be used: {reason}. Give a checkpoint, auto or never.")
    return checkpoint


def begin(config: Config, start: Start) -> None:
    """Makes the directory ready for this start. Main process only, after everything was checked."""
    directory = config.run.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    if start.checkpoint is None:
        for name in ("checkpoints", "adapter", "samples", TENSORBOARD):
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in (METRICS, LEDGER):
            (directory / name).unlink(missing_ok=True)
    (directory / CONFIG).write_text(dump(config))


def describe_changes(changed: tuple[Change, ...] | list[Change]) -> str:
    """One line a setting: before and after."""
    return "\n".join(f"  {change.path}: {change.before} -> {change.after}" for change in changed)


def _has_progress(directory: Path) -> bool:
    metrics = directory / METRICS
    trained = metrics.is_file() and '"train/loss"' in metrics.read_text()
    return trained or any((directory / "checkpoints").glob("step-*")) or (directory / "adapter").is_dir()


def _refusal(directory: Path, trains: list[Change]) -> str:
    return (
        f"{directory} holds a run with other settings that shape what is trained:\n{describe_changes(trains)}\n"
        "Give another run.output_dir, or the same settings, or run.allow_changes=true to go on with the new ones."
    )
