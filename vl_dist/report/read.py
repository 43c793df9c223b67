"""What a run left in its output directory, as the report needs it: read tolerantly, since a run may be under way."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vl_dist.errors import UserError
from vl_dist.run.files import CONFIG, METRICS, OUTCOME

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run."""

    name: str  # the end of its path that tells it from the others
    directory: Path
    settings: dict[str, Any]  # by dotted path
    rows: tuple[Row, ...]  # of metrics.jsonl, by step, each step once
    samples: dict[int, tuple[Row, ...]]  # held-out samples by step
    outcome: Row | None  # None: under way, or ended without a word
    image_root: Path | None  # where the samples' images are; None: not known


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs in these output directories, in order.

    Raises:
        UserError: one of them is no output directory of a run, or its settings cannot be read.
    """
    return [_read_run(path, name) for path, name in zip(directories, _short_names(directories), strict=True)]


def _read_run(directory: Path, name: str) -> RunRecord:
    if not (directory / CONFIG).is_file():
        what = f"has no {CONFIG}" if directory.is_dir() else "is no directory"
        raise UserError(f"{directory} {what}. Give the output directory (run.output_dir) of a run of train.py.")
    settings = _read_settings(directory / CONFIG)
    by_step = {row["step"]: row for row in _objects(directory / METRICS) if isinstance(row.get("step"), int)}
    return RunRecord(
        name=name,
        directory=directory,
        settings=settings,
        rows=tuple(by_step[step] for step in sorted(by_step)),
        samples=_read_samples(directory / "samples", set(by_step)),
        outcome=next(_objects(directory / OUTCOME), None),
        image_root=_image_root(settings),
    )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}). Start the run again to have it written."
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings. Give the output directory (run.output_dir) of a run of train.py.")
    return dict(_leaves(tree, ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _objects(path: Path) -> Iterator[Row]:
    """The JSON objects of a file's lines; a line that is being written, or was cut by a kill, is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _read_samples(directory: Path, steps: set[int]) -> dict[int, tuple[Row, ...]]:
    """Samples of the evaluations that metrics.jsonl has; others are of steps that a resumed run has yet to repeat."""
    found = {}
    for path in sorted(directory.glob("step-*.jsonl")):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) in steps:
            found[int(number)] = tuple(row for row in _objects(path) if _is_sample(row))
    return found


def _is_sample(row: Row) -> bool:
    kinds = {"prediction": str, "references": list, "images": list}
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def _image_root(settings: dict[str, Any]) -> Path | None:
    """As training resolves it: `data.image_root`, or the folder of the held-out file, or of the training file."""
    root, held_out, train = (settings.get(f"data.{name}") for name in ("image_root", "eval", "train"))
    if root is not None:
        return Path(str(root))
    if held_out is not None and not str(held_out).startswith("last:"):
        return Path(str(held_out)).parent
    return Path(str(train)).parent if train is not None else None


def _short_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different; whole paths where one is given twice."""
    parts = [Path(os.path.abspath(path)).parts for path in directories]  # noqa: PTH100  # links keep their own names
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(directories, start=1)]
