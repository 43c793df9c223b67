"""Tables of images and captions: CSV files, and Hugging Face datasets by name or on disk (parquet, arrow)."""

import csv
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from vl_dist.data.sources.rows import ImageData, ImageFile, Row, Skipped, Source, UnusableError, cleaned, encode
from vl_dist.errors import UserError

IMAGE_FOLDER = "images"
FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}


def from_csv(path: Path, *, image_column: str, caption_column: str) -> Source:
    """A CSV file with a header. Relative image paths are relative to the file's folder.

    Raises:
        UserError: no such file, not CSV in UTF-8, or a column is missing.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give a CSV file with the columns {image_column} and {caption_column}.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error}). Save it as UTF-8 with commas.") from None
    _require_columns(str(path), columns, image_column, caption_column)
    return Source(_csv_rows(rows, path.parent, image_column, caption_column), len(rows), image_root=path.parent)


def _csv_rows(rows: list[dict[str, str | None]], folder: Path, image: str, caption: str) -> Iterator[Row | Skipped]:
    for number, row in enumerate(rows, start=1):
        name = (row[image] or "").strip()
        place = f"row {number}: {name}" if name else f"row {number}"
        if not name:
            yield Skipped(place, "no image path")
        elif "://" in name:
            yield Skipped(place, "URLs are not fetched")
        else:
            yield Row(place, ImageFile(folder / name), cleaned([row[caption] or ""]))


def from_dataset(name: str, *, split: str, subset: str | None, image_column: str, caption_column: str) -> Source:
    """A Hugging Face dataset: its name on the hub, a folder of parquet or arrow files, one such file, or a saved dataset.

    Args:
        image_column: images (kept as they are encoded where they are), encoded bytes, or paths on this disk.
        caption_column: a text, or a list of texts.

    Raises:
        UserError: it cannot be opened, or has no such split or column.
    """
    errors = _dataset_errors()
    try:
        table = _undecoded(_open_dataset(name, split, subset))
        first = next(iter(table.take(1)), None)
    except errors as error:
        raise UserError(_not_read(name, split, error)) from None
    if first is None:
        raise UserError(f"{name} has no row in its split {split}. Give another --split.")
    _require_columns(name, list(first), image_column, caption_column)

    def read_on() -> Iterator[Any]:
        try:
            yield from table
        except errors as error:  # a damaged part shows only when it is reached
            raise UserError(_not_read(name, split, error)) from None

    path = Path(name)
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    num_rows = len(table) if hasattr(table, "__len__") else None
    rows = _dataset_rows(read_on(), folder, split, image_column, caption_column)
    return Source(rows, num_rows, image_root=folder)


def _dataset_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises for data that is not there, not reachable or not readable.

    Raises:
        UserError: it is not installed.
    """
    try:
        import httpx
        import pyarrow as pa  # type: ignore[import-untyped]
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(f"This needs packages that are not installed ({error}): pip install datasets.") from None
    return (OSError, ValueError, RuntimeError, LookupError, pa.ArrowException, httpx.HTTPError, DatasetsError)


def _open_dataset(name: str, split: str, subset: str | None) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    if not path.exists():
        return load_dataset(name, subset, split=split)  # kept in its cache: a second start fetches nothing
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(name)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    kind = FILE_KINDS.get(path.suffix)
    if path.is_file() and kind is None:
        raise ValueError("a single file must end in .parquet or .arrow")
    with TemporaryDirectory() as cache:  # read in place: the usual cache would copy everything
        options: dict[str, Any] = {"split": split, "streaming": True, "cache_dir": cache}
        if path.is_file():
            return load_dataset(kind, data_files={split: str(path)}, **options)
        return load_dataset(name, subset, **options)


def _undecoded(table: Any) -> Any:
    """Images as their encoded bytes, not their pixels."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    if not isinstance(table, Dataset):
        return table.decode(False)
    for column, feature in table.features.items():
        if isinstance(feature, ImageFeature):
            table = table.cast_column(column, ImageFeature(decode=False))
    return table


def _dataset_rows(
    table: Iterator[Any], folder: Path | None, split: str, image: str, caption: str
) -> Iterator[Row | Skipped]:
    for number, row in enumerate(table):
        place = f"row {number + 1}"
        texts = [row[caption]] if isinstance(row[caption], str) else row[caption]
        if texts is not None and (not isinstance(texts, list) or not all(isinstance(text, str) for text in texts)):
            yield Skipped(place, "its caption is neither a text nor a list of texts")
            continue
        name = f"{split}-{number:07d}"
        try:
            data = encoded_image(row[image], folder)
        except UnusableError as error:
            yield Skipped(place, str(error))
        else:
            yield Row(place, ImageData(f"{IMAGE_FOLDER}/{name}", data), cleaned(texts or []), id=name)


def encoded_image(cell: Any, folder: Path | None) -> bytes:
    """The encoded image of a cell: bytes, a path, `{"bytes": …, "path": …}`, or a decoded image, which becomes PNG.

    Args:
        folder: where relative paths start; None: a path that stands alone in a cell is none of this disk's.

    Raises:
        UnusableError: no image there, or its file cannot be read.
    """
    if isinstance(cell, dict):
        cell, folder = cell.get("bytes") or cell.get("path"), folder or Path()  # the path is of the data set's own cache
    if isinstance(cell, Image.Image):
        return encode(cell, "PNG")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or not cell:
        raise UnusableError("no image")
    if "://" in cell:
        raise UnusableError("URLs are not fetched")
    try:
        if folder is not None:
            return (folder / cell).read_bytes()
    except (OSError, ValueError):  # ValueError: a null byte in the path
        pass
    raise UnusableError("there is no such file")


def _require_columns(name: str, columns: list[str], image_column: str, caption_column: str) -> None:
    for option, column in (("--image-column", image_column), ("--caption-column", caption_column)):
        if column not in columns:
            raise UserError(f"{name} has no column {column!r}. Set {option} to one of: {', '.join(columns) or 'none'}.")


def _not_read(name: str, split: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    advice = (
        "Give a folder or a file of parquet or arrow, and a split that is in it."
        if Path(name).exists()
        else "Check the name, the split and the network; a dataset that is on this disk is given by its folder."
    )
    return f"{name} (split {split}) cannot be read as a dataset ({type(error).__name__}: {reason}). {advice}"
