"""The scan of record files: every row and every image header, and whether too much is unusable.

The lengths index that training reads and `python -m vl_dist validate` share it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vl_dist.data.image_files import ImageLimits
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.lengths import HeaderReader, Sizes, read_sizes
from vl_dist.data.record_files import BadRow, Row, read_rows
from vl_dist.data.records import Record
from vl_dist.errors import UserError
from vl_dist.rules import held_out_count
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


def image_root(path: Path, data: DataConfig) -> Path:
    """What the image paths of a record file are relative to."""
    return data.image_root or path.parent


def record_paths(data: DataConfig) -> tuple[Path, ...]:
    """All record files: those to train on and, where it is a file of its own, the held-out one."""
    train = tuple(file.path for file in data.train)
    return train if data.eval is None or data.eval.startswith("last:") else (*train, Path(data.eval))


def scan(
    data: DataConfig, shape: PatchShape, *, decode: bool = False, on_progress: Progress = lambda what, done, total: None
) -> tuple[ScannedFile, ...]:
    """Every record file.

    Args:
        decode: decode every image too.

    Raises:
        UserError: a file is missing, empty, or no record file at all.
    """
    return tuple(scan_file(path, data, shape, decode=decode, on_progress=on_progress) for path in record_paths(data))


def scan_file(
    path: Path,
    data: DataConfig,
    shape: PatchShape,
    *,
    decode: bool = False,
    on_progress: Progress = lambda what, done, total: None,
) -> ScannedFile:
    """One record file; as `scan`."""
    rows = read_rows(path, default_prompt=data.prompt)
    root = image_root(path, data)
    limits = image_limits(data)
    names = [name for row in rows if isinstance(row, Record) for name in row.image_paths]
    sizes = read_sizes(
        names,
        root,
        limits,
        decode=decode,
        on_progress=lambda done, total: on_progress(f"images of {path.name}", done, total),
    )
    headers = HeaderReader(root, pixel_budget(data), shape, limits, sizes=sizes)
    return ScannedFile(path, root, tuple(_with_images(row, path, headers) for row in rows), sizes)


def _with_images(row: Row, path: Path, headers: HeaderReader) -> Row:
    fault = headers.fault(row) if isinstance(row, Record) else None
    return row if fault is None or isinstance(row, BadRow) else BadRow(row.id, row.place, fault)


def training_rows(num_rows: Sequence[int], held_out: str | None) -> list[int]:
    """How many rows of each training file are trained on, from its first; the others are held out.

    Rows that cannot be used count, so that none moves to the other side because of another.

    Args:
        num_rows: of each training file.
        held_out: `data.eval`.

    Raises:
        UserError: nothing would be left to train on.
    """
    if held_out is None or not held_out.startswith("last:"):
        return list(num_rows)
    count, total = held_out_count(held_out), sum(num_rows)
    if count >= total:
        raise UserError(f"data.eval is last:{count}, but there are only {total} records. Hold out fewer, or give more.")
    kept = total - count
    ends = [sum(num_rows[: n + 1]) for n in range(len(num_rows))]
    return [max(0, min(rows, kept - (end - rows))) for rows, end in zip(num_rows, ends, strict=True)]


def refuse_too_many_bad(path: Path, bad: Sequence[BadRow], num_rows: int, max_bad_fraction: float) -> None:
    """Checks a record file against the budget.

    Raises:
        UserError: more than this fraction of its records cannot be used; the message names the first few.
    """
    if len(bad) > max_bad_fraction * num_rows:
        raise UserError(
            f"{len(bad)} of {num_rows} records of {path} cannot be used, more than data.max_bad_fraction="
            f"{max_bad_fraction:g} allows. Mend or remove them, or raise it to train without them; "
            f"python -m vl_dist validate lists them all.\n{first_bad(bad)}"
        )


def first_bad(bad: Sequence[BadRow]) -> str:
    """The first few, a line each."""
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
