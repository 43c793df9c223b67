"""The scan of all record files before training: every row and every image header, and whether too much is unusable.

Training and `python -m vl_dist validate` share it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vl_dist.config import held_out_count
from vl_dist.data.image_files import ImageLimits
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.lengths import HeaderReader, Sizes, read_sizes
from vl_dist.data.record_files import BadRow, Row, read_rows, split_held_out
from vl_dist.data.records import Record
from vl_dist.errors import UserError
from vl_dist.settings import DataConfig

BAD_ROWS = "bad_rows.jsonl"
NUM_SHOWN = 5  # bad rows in a message; the report has all

Progress = Callable[[str, int, int], None]  # what is read, how much of it was, and how much there is


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """One record file: its rows in order, those with an image that cannot be used made bad."""

    path: Path
    root: Path  # image paths are relative to it
    rows: tuple[Row, ...]
    sizes: Sizes

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """Rows that cannot be used."""
        return tuple(row for row in self.rows if isinstance(row, BadRow))


@dataclass(frozen=True, slots=True)
class Split:
    """Records to train on or held out."""

    records: tuple[Record, ...]
    file: ScannedFile


def pixel_budget(data: DataConfig) -> PixelBudget:
    """The size of every image, from the settings."""
    return PixelBudget(
        resized_height=data.resized_height,
        resized_width=data.resized_width,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
    )


def image_limits(data: DataConfig) -> ImageLimits:
    """Which image files are accepted, from the settings."""
    return ImageLimits(max_bytes=data.max_image_bytes, url_cache=data.url_cache if data.allow_urls else None)


def scan(
    data: DataConfig, shape: PatchShape, *, decode: bool = False, on_progress: Progress = lambda what, done, total: None
) -> tuple[ScannedFile, ...]:
    """The training file and, where it is a file of its own, the held-out one.

    Args:
        decode: decode every image too.

    Raises:
        UserError: a file is missing, empty, or no record file at all.
    """
    paths = [data.train]
    if data.eval is not None and not data.eval.startswith("last:"):
        paths.append(Path(data.eval))
    return tuple(_scan_file(path, data, shape, decode, on_progress) for path in paths)


def _scan_file(path: Path, data: DataConfig, shape: PatchShape, decode: bool, on_progress: Progress) -> ScannedFile:
    rows = read_rows(path, default_prompt=data.prompt)
    root = data.image_root or path.parent
    limits = image_limits(data)
    names = [name for row in rows if isinstance(row, Record) for name in row.image_paths]
    sizes = read_sizes(
        names, root, limits, decode=decode, on_progress=lambda done, total: on_progress(str(path), done, total)
    )
    headers = HeaderReader(root, pixel_budget(data), shape, limits, sizes=sizes)
    return ScannedFile(path, root, tuple(_with_images(row, path, headers) for row in rows), sizes)


def _with_images(row: Row, path: Path, headers: HeaderReader) -> Row:
    fault = headers.fault(row) if isinstance(row, Record) else None
    return row if fault is None or isinstance(row, BadRow) else BadRow(row.id, row.place, fault)


def splits(files: Sequence[ScannedFile], held_out: str | None) -> tuple[Split, Split | None]:
    """The records to train on and those held out.

    Args:
        files: from `scan`.
        held_out: `data.eval`.

    Raises:
        UserError: one of the two has no record that can be used.
    """
    train, others = files[0], files[1:]
    if others:
        return _split(train.rows, train, "data.train"), _split(others[0].rows, others[0], "data.eval")
    if held_out is None:
        return _split(train.rows, train, "data.train"), None
    first, last = split_held_out(train.rows, held_out_count(held_out))
    return _split(first, train, "data.train"), _split(last, train, f"data.eval={held_out}")


def _split(rows: Sequence[Row], file: ScannedFile, key: str) -> Split:
    records = tuple(row for row in rows if isinstance(row, Record))
    if not records:
        raise UserError(f"None of the {len(rows)} records of {key} in {file.path} can be used:\n{_first(rows)}")
    return Split(records, file)


def refuse_too_many_bad(files: Sequence[ScannedFile], max_bad_fraction: float) -> None:
    """Checks each file against the budget.

    Raises:
        UserError: more than this fraction of a file's records cannot be used; the message names the first few.
    """
    for file in files:
        if len(file.bad) > max_bad_fraction * len(file.rows):
            raise UserError(
                f"{len(file.bad)} of {len(file.rows)} records cannot be used, more than data.max_bad_fraction="
                f"{max_bad_fraction:g} allows. Mend or remove them, or raise it to train without them; "
                f"python -m vl_dist validate lists them all.\n{_first(file.rows)}"
            )


def _first(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if isinstance(row, BadRow)]
    more = [f"  and {len(bad) - NUM_SHOWN} more"] if len(bad) > NUM_SHOWN else []
    return "\n".join([*(f"  {row}" for row in bad[:NUM_SHOWN]), *more])


def write_bad_rows(path: Path, bad: Sequence[BadRow]) -> None:
    """The report: one JSON object a row with id, place and reason; empty if there is none. Whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad), encoding="utf-8")
    temporary.replace(path)


def kinds_of(bad: Sequence[BadRow]) -> Counter[str]:
    """How many rows are bad for like reasons."""
    return Counter(_kind(row.reason) for row in bad)


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: the path, what stands in parentheses, quotes and numbers."""
    short = re.sub(r"^image .*?: ", "image: ", reason).split(" (")[0]
    return re.sub(r"\d[\d,]*", "N", re.sub(r"'[^']*'", "'...'", short))
