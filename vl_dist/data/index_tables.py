"""The tables of a lengths index on disk: written whole or not at all, and read by mapping them into memory.

prompts.arrow   one row for each distinct prompt: its messages as JSON
examples.arrow  one row for each example: id, prompt, answer, row and place of its record, and its sizes
images.arrow    one row for each distinct image: path, bytes and time of change when it was read
index.json      bytes of the tables, number of rows in the record file, and its unusable rows; written last
"""

import functools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.examples import ExampleFile
from vl_dist.data.lengths import Lengths
from vl_dist.data.record_files import BadRow
from vl_dist.data.records import Example, Message, messages_to_json, parse_messages

ABOUT = "index.json"
SIZES = ("tokens", "targets", "patches", "images", "trunk")
Columns = dict[str, tuple[str, Sequence[Any]]]  # by name: a type by its Arrow name, and values


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedFile:
    """One record file, measured."""

    path: Path
    root: Path  # image paths are relative to it
    examples: ExampleFile
    lengths: Lengths  # of all its examples, however long
    record_rows: NDArray[np.int64]  # [N] which row of the file each example's record is, unusable ones counted
    places: Sequence[str]  # [N] where each example's record stands in the file
    num_rows: int  # of the file, unusable ones included
    bad: tuple[BadRow, ...]
    uncached: str | None = None  # why it is in memory although it should be on disk


class Column(Sequence[str]):
    """A column of texts, read when asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


class ArrowFile:
    """Examples in memory-mapped tables."""

    def __init__(self, examples: Any, prompts: Any) -> None:
        self._ids, self._answers = examples["id"], examples["answer"]
        self._messages = prompts["messages"]
        self.prompts: NDArray[np.int64] = examples["prompt"].to_numpy().astype(np.int64)
        self._recent: dict[int, tuple[Message, ...]] = {}  # answers of one record ask for the same prompt one after another

    def example(self, row: int) -> Example:
        """The example of a row."""
        number = int(self.prompts[row])
        if number not in self._recent:
            self._recent = {number: parse_messages(json.loads(self._messages[number].as_py()))}
        return Example(self._ids[row].as_py(), self._recent[number], self._answers[row].as_py())

    def ids(self) -> list[str]:
        """The ids of all rows."""
        found: list[str] = self._ids.to_pylist()
        return found


@functools.cache
def datasets_installed() -> bool:
    """Whether tables can be written and mapped here."""
    try:
        import datasets  # noqa: F401 - slow to import, and absent on some GPU images
    except ImportError:
        return False
    return True


def _read_table(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path)).data.table


def read_tables(target: Path, path: Path, root: Path) -> IndexedFile | None:
    """The index of a record file in the folder `target`; None: there is none that is whole and still true of the images."""
    try:
        about: dict[str, Any] = json.loads((target / ABOUT).read_text())
        whole = all((target / name).stat().st_size == size for name, size in about["bytes"].items())
    except (OSError, ValueError, KeyError):
        return None
    images = _read_table(target / "images.arrow") if whole else None
    if images is None:
        return None
    states = list(zip(images["bytes"].to_pylist(), images["changed_ns"].to_pylist(), strict=True))
    if _image_states(images["path"].to_pylist(), root) != states:
        return None
    table = _read_table(target / "examples.arrow")
    return IndexedFile(
        path=path,
        root=root,
        examples=ArrowFile(table, _read_table(target / "prompts.arrow")),
        lengths=Lengths.of_rows(np.stack([table[name].to_numpy() for name in SIZES], axis=1)),
        record_rows=table["record_row"].to_numpy().astype(np.int64),
        places=Column(table["place"]),
        num_rows=about["num_rows"],
        bad=tuple(BadRow(**row) for row in about["bad"]),
    )


def write_tables(target: Path, built: IndexedFile, image_paths: Sequence[str]) -> None:
    """All tables, then `index.json`, then the name: whole or not there. Nothing where no example is.

    Raises:
        OSError: the disk does not take it; nothing is left.
    """
    if len(built.lengths) == 0:
        return
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    temporary.mkdir()
    try:
        tables = {
            "prompts": _prompts_of(built),
            "examples": _columns_of(built),
            "images": _images_of(image_paths, built.root),
        }
        for name, columns in tables.items():
            _write_table(temporary / f"{name}.arrow", columns)
        sizes = {f"{name}.arrow": (temporary / f"{name}.arrow").stat().st_size for name in tables}
        about = {"bytes": sizes, "num_rows": built.num_rows, "bad": [asdict(row) for row in built.bad]}
        (temporary / ABOUT).write_text(json.dumps(about))
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_table(path: Path, columns: Columns) -> None:
    """A table in the form that `Dataset.from_file` maps; columns are a type by its Arrow name, and values."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({name: Value(kind) for name, (kind, _) in columns.items()})
    with ArrowWriter(path=str(path), features=features) as writer:
        writer.write_batch({name: list(values) for name, (_, values) in columns.items()})
        writer.finalize()


def _prompts_of(built: IndexedFile) -> Columns:
    _, first = np.unique(built.examples.prompts, return_index=True)  # numbers go up in the order they first appear
    messages = (built.examples.example(n).prompt for n in first.tolist())
    return {"messages": ("string", [json.dumps(messages_to_json(prompt), ensure_ascii=False) for prompt in messages])}


def _columns_of(built: IndexedFile) -> Columns:
    lengths = built.lengths
    sizes = dict(zip(SIZES, (lengths.tokens, lengths.targets, lengths.patches, lengths.images, lengths.trunk), strict=True))
    return {
        "id": ("string", built.examples.ids()),
        "prompt": ("int32", built.examples.prompts.tolist()),
        "answer": ("string", [built.examples.example(n).answer for n in range(len(lengths))]),
        "record_row": ("int32", built.record_rows.tolist()),
        "place": ("string", built.places),
        **{name: ("int32", values.tolist()) for name, values in sizes.items()},
    }


def _images_of(paths: Sequence[str], root: Path) -> Columns:
    states = _image_states(paths, root)
    return {
        "path": ("string", paths),
        "bytes": ("int64", [size for size, _ in states]),
        "changed_ns": ("int64", [changed for _, changed in states]),
    }


def _image_states(paths: Sequence[str], root: Path) -> list[tuple[int, int]]:
    """Bytes and time of change of each image; (-1, -1) where there is none, as for URLs, which are fetched only once."""
    prefix = str(root)
    return [_state(os.path.join(prefix, path)) for path in paths]  # noqa: PTH118 - a Path each would take ten times as long


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns
