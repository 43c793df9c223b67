"""`python -m vl_dist prepare SOURCE ...`: data sets become records.jsonl."""

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vl_dist.data.sources import coco, tables
from vl_dist.data.sources.folder import from_folder
from vl_dist.data.sources.rows import Source
from vl_dist.data.sources.tutorial import from_tutorial_json
from vl_dist.data.sources.write import SKIPPED, Job, Prepared, prepare
from vl_dist.errors import UserError

TUTORIAL_EXAMPLES = 500  # as many as the tutorial takes
STOPPED = 85  # the exit code of what was stopped on request and can go on, as in training
HELD_OUT = 4  # records that recipes/coco2014_tutorial.yaml holds out
ENOUGH_FOR_FAST = 5_000  # records; recipes/coco2014_fast.yaml holds out 500 of them, and wants several answers to each


def add_command(commands: Any) -> None:
    """Adds `prepare` to the commands of an argparse parser."""
    parser = commands.add_parser("prepare", help="make records.jsonl from a data set")
    sources = parser.add_subparsers(required=True, metavar="SOURCE")

    limit = f"{TUTORIAL_EXAMPLES} from ModelScope or with --as-tutorial, else all"
    about = "COCO 2014 captions, from ModelScope or from the official files"
    coco2014 = _source(sources, "coco2014", _coco2014, about, limit)
    coco2014.add_argument("--root", type=Path, help="folder of the official files: annotations/, train2014/, val2014/")
    coco2014.add_argument("--split", choices=("train", "val"), default="train", help="(default train)")
    coco2014.add_argument("--as-tutorial", action="store_true", help="write the tutorial's CSV and data_vl.json instead")

    hf = _source(sources, "hf", _hf, "a Hugging Face dataset by name, or a folder or file of parquet or arrow")
    hf.add_argument("name", metavar="NAME_OR_DIR", help="name on the hub, folder or file")
    hf.add_argument("--split", default="train", help="(default train)")
    hf.add_argument("--subset", help="name of the dataset's configuration, if it has several")
    _columns(hf, image="image")

    table = _source(sources, "csv", _csv, "a CSV file; rows of one image become one record")
    table.add_argument("file", type=Path, metavar="FILE")
    _columns(table, image="image_path")

    tutorial = _source(sources, "tutorial-json", _tutorial_json, "the tutorial's data_vl.json")
    tutorial.add_argument("file", type=Path, metavar="FILE")

    folder = _source(sources, "folder", _folder, "images with .txt files of the same names, one caption a line")
    folder.add_argument("folder", type=Path, metavar="DIR")


def _source(
    sources: Any, name: str, run: Callable[[argparse.Namespace], None], description: str, limit: str = "all"
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = sources.add_parser(name, help=description, description=description)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for records.jsonl, and images that have no file yet"
    )
    parser.add_argument("--prompt", default="COCO Yes:", help="text after the image (default 'COCO Yes:')")
    parser.add_argument("--max-examples", type=int, metavar="N", help=f"stop after N captions (default {limit})")
    parser.set_defaults(run=run)
    return parser


def _columns(parser: argparse.ArgumentParser, *, image: str) -> None:
    parser.add_argument("--image-column", default=image, help=f"(default {image})")
    parser.add_argument("--caption-column", default="caption", help="(default caption)")


def _coco2014(given: argparse.Namespace) -> None:
    root, split, as_tutorial = given.root, given.split, given.as_tutorial
    if as_tutorial and given.prompt != "COCO Yes:":
        raise UserError(
            "--as-tutorial writes the tutorial's own prompt: leave --prompt out, and set data.prompt in training."
        )
    if given.max_examples is None and (as_tutorial or root is None):
        given.max_examples = TUTORIAL_EXAMPLES
    copies = as_tutorial or root is None

    def open_source() -> Source:
        if root is None:
            return coco.from_modelscope(split, verbatim=as_tutorial)
        return coco.from_official(root, split, as_tutorial=as_tutorial)

    where = _stamp(root / "annotations" / f"captions_{split}2014.json") if root is not None else coco.HUB_NAME
    settings = {"from": where, "split": split, "as_tutorial": as_tutorial}
    _run(given, "coco2014", settings, open_source, image_folder=coco.IMAGE_FOLDER if copies else None, tutorial=as_tutorial)


def _hf(given: argparse.Namespace) -> None:
    def open_source() -> Source:
        return tables.from_dataset(
            given.name,
            split=given.split,
            subset=given.subset,
            image_column=given.image_column,
            caption_column=given.caption_column,
        )

    where = _stamp(Path(given.name)) if Path(given.name).exists() else given.name
    settings = {"from": where, "split": given.split, "subset": given.subset} | _column_settings(given)
    _run(given, "hf", settings, open_source, image_folder=tables.IMAGE_FOLDER)


def _csv(given: argparse.Namespace) -> None:
    def open_source() -> Source:
        return tables.from_csv(given.file, image_column=given.image_column, caption_column=given.caption_column)

    _run(given, "csv", {"from": _stamp(given.file)} | _column_settings(given), open_source)


def _tutorial_json(given: argparse.Namespace) -> None:
    _run(given, "tutorial-json", {"from": _stamp(given.file)}, lambda: from_tutorial_json(given.file))


def _folder(given: argparse.Namespace) -> None:
    _run(given, "folder", {"from": str(given.folder.resolve())}, lambda: from_folder(given.folder))


def _column_settings(given: argparse.Namespace) -> dict[str, Any]:
    return {"image_column": given.image_column, "caption_column": given.caption_column}


def _stamp(path: Path) -> str:
    """A path, and for a file what tells it from a later one of the same name."""
    if not path.is_file():
        return str(path.resolve())
    status = path.stat()
    return f"{path.resolve()} ({status.st_size} bytes, changed {status.st_mtime_ns})"


def _run(
    given: argparse.Namespace,
    name: str,
    settings: Mapping[str, Any],
    open_source: Callable[[], Source],
    *,
    image_folder: str | None = None,
    tutorial: bool = False,
) -> None:
    if given.max_examples is not None and given.max_examples < 1:
        raise UserError(f"--max-examples is {given.max_examples}; it must be 1 or more.")
    common = {"max_examples": given.max_examples, "prompt": given.prompt}
    job = Job(
        out=given.out,
        source={"prepare": name, **settings, **common},
        image_folder=image_folder,
        prompt=given.prompt,
        max_examples=given.max_examples,
        as_tutorial=tutorial,
    )
    console = Console(highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    def on_row(num_rows: int | None) -> Callable[[int], None]:
        progress.start()  # only now: the clients' own bars for what they fetch come before it
        task = progress.add_task("rows", total=num_rows)
        return lambda done: progress.update(task, completed=done)

    try:
        prepared, was_there = prepare(job, open_source, on_row)
    except KeyboardInterrupt:
        console.print(Text("Stopped. The same command goes on from here."), soft_wrap=True)
        raise SystemExit(STOPPED) from None
    finally:
        progress.stop()
    console.print(Text(closing_message(prepared, given.out, was_there=was_there)), soft_wrap=True)


def closing_message(prepared: Prepared, out: Path, *, was_there: bool) -> str:
    """What is there now, what was left out and why, and the command to type next."""
    file = out / prepared.file
    lines = [f"{file} was complete already; nothing was written." if was_there else f"{file} is complete."]
    counts = (prepared.num_records, prepared.num_examples, prepared.num_images)
    lines.append("{:,} records, {:,} examples, {:,} images.".format(*counts))
    if prepared.skipped:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in prepared.skipped.items())
        lines.append(f"{sum(prepared.skipped.values()):,} rows were skipped ({reasons}). Each is in {out / SKIPPED}.")
    settings = [f"data.train={file}"]
    if prepared.image_root is not None:
        lines.append(f"Image paths are relative to {prepared.image_root}: set data.image_root to it.")
        settings.append(f"data.image_root={prepared.image_root}")
    if prepared.num_records <= HELD_OUT:
        settings.append("data.eval=null")
    words = " ".join(shlex.quote(setting) for setting in settings)
    several_answers = prepared.num_examples > prepared.num_records >= ENOUGH_FOR_FAST
    recipe = f"recipes/coco2014_{'fast' if several_answers else 'tutorial'}.yaml"
    lines.append(f"Next: accelerate launch train.py {recipe} {words} model.path=DIRECTORY_OF_THE_MODEL")
    return "\n".join(lines)
