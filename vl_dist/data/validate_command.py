"""`python -m vl_dist validate`: the scan of training, with a bar, a table of what was found, and a report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vl_dist.data.images import PatchShape
from vl_dist.data.record_files import BadRow
from vl_dist.data.records import Record, examples_of
from vl_dist.data.validate import (
    BAD_ROWS,
    ScannedFile,
    first_bad,
    kinds_of,
    refuse_too_many_bad,
    scan,
    training_rows,
    write_bad_rows,
)
from vl_dist.errors import UserError
from vl_dist.settings import Config

QWEN2_VL = PatchShape(patch_size=14, merge_size=2)  # no model is needed to check records


def validate(config: Config, *, out: Path | None, decode: bool) -> None:
    """Prints what can be used of the recipe's record files and writes the report of what cannot.

    Args:
        out: the report; None: `bad_rows.jsonl` in the folder of the training records.
        decode: decode every image too.

    Raises:
        UserError: nothing to train on, or too many bad records (the report is written before), or it cannot be written.
    """
    console = Console(highlight=False)
    if config.shapes is not None:
        from vl_dist.shapes import make_shapes  # needs torch, which is slow to import

        made = make_shapes(config.shapes)
        if made is not None:
            console.print(Text(made), soft_wrap=True)
    with _progress(console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        files = scan(config.data, QWEN2_VL, decode=decode, on_progress=show)
    console.print(_table(files))
    report = out if out is not None else config.data.train[0].path.parent / BAD_ROWS
    bad = [row for file in files for row in file.bad]
    try:
        write_bad_rows(report, bad)
    except OSError as error:
        raise UserError(f"The report {report} cannot be written ({error.strerror}); give another --out.") from None
    console.print(Text(f"Report: {report} ({len(bad)} rows)"), soft_wrap=True)
    _refuse_empty(files, config)
    for file in files:
        refuse_too_many_bad(file.path, file.bad, len(file.rows), config.data.max_bad_fraction)


def _refuse_empty(files: Sequence[ScannedFile], config: Config) -> None:
    """Raises `UserError` where no record is left to train on, or none is held out although some should be."""
    num_train = len(config.data.train)
    kept = training_rows([len(file.rows) for file in files[:num_train]], config.data.eval)
    train = [row for file, count in zip(files, kept, strict=False) for row in file.rows[:count]]
    held_out = [row for file, count in zip(files, kept, strict=False) for row in file.rows[count:]]
    held_out += [row for file in files[num_train:] for row in file.rows]
    for what, rows in (("data.train", train), (f"data.eval={config.data.eval}", held_out)):
        bad = [row for row in rows if isinstance(row, BadRow)]
        if rows and len(bad) == len(rows):
            raise UserError(f"None of the {len(rows)} records of {what} can be used:\n{first_bad(bad)}")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _table(files: Sequence[ScannedFile]) -> Table:
    table = Table()
    table.add_column("")
    for file in files:
        table.add_column(Text(file.path.name), justify="right")
    kinds = [kinds_of(file.bad) for file in files]
    records = [[row for row in file.rows if isinstance(row, Record)] for file in files]
    counts = {
        "rows": [len(file.rows) for file in files],
        "records": [len(found) for found in records],
        "examples": [len(examples_of(found)) for found in records],
        "images": [len({path for row in found for path in row.image_paths}) for found in records],
        "unusable rows": [len(file.bad) for file in files],
    }
    counts |= {f"  {kind}": [found[kind] for found in kinds] for kind in dict.fromkeys(k for found in kinds for k in found)}
    for name, numbers in counts.items():
        table.add_row(Text(name), *(f"{number:,}" for number in numbers))
    return table
