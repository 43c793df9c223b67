"""The lengths index of a record file: its examples and what each costs, from text and image headers alone.

Where `datasets` is installed the index is kept on disk as Arrow tables, which are memory-mapped: a warm start parses no
record, reads no image and tokenises nothing, and ranks and loader workers of one machine share its pages. It is named by a
hash of all that changes it, and images are looked at for another size or time. One process builds while others wait on a
file lock, not in a collective, so that it does not matter how long that takes. Elsewhere every process builds its own in
memory.

Files of an index, in a folder named by its key:
    prompts.arrow   one row for each distinct prompt: its messages as JSON
    examples.arrow  one row for each example: id, prompt, answer, row and place of its record, and its sizes
    images.arrow    one row for each distinct image: path, bytes and time of change when it was read
    index.json      bytes of the tables, number of rows in the record file, and its unusable rows
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from vl_dist.data.encode import Encoder, template_hash
from vl_dist.data.examples import ExampleFile, MemoryFile
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, Lengths, size_of
from vl_dist.data.record_files import BadRow
from vl_dist.data.records import Example, Message, Record, examples_of, messages_to_json, parse_messages
from vl_dist.data.validate import Progress, ScannedFile, image_limits, image_root, pixel_budget, scan_file
from vl_dist.settings import DataConfig

FORMAT = 1  # of the tables, and of everything that decides on a length and is not in the key
FOLDER = ".lengths"  # beside the record file
NUM_KEPT = 8  # indexes in a folder; settings that are tried out leave one each
SIZES = ("tokens", "targets", "patches", "images", "trunk")


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


class Indexer:
    """Opens and builds indexes for one processor and one set of settings."""

    def __init__(self, processor: Any, encoder: Encoder, shape: PatchShape, data: DataConfig) -> None:
        self._processor = processor
        self._encoder = encoder
        self._shape = shape
        self._data = data

    def open(
        self, path: Path, *, on_progress: Progress = lambda what, done, total: None, yield_s: float = 0.0
    ) -> IndexedFile:
        """The index of a record file, from disk or built now.

        Args:
            path: a record file.
            on_progress: called while it is built.
            yield_s: seconds to let another process begin to build it first.

        Raises:
            UserError: no such file, or no record file at all.
        """
        folder = self._folder(path)
        if folder is None or not path.is_file():
            return self._build(path, on_progress)[0]
        target = folder / self._key(path)
        _wait_until_begun(target, yield_s)
        found: IndexedFile | None = None
        try:
            folder.mkdir(exist_ok=True, parents=True)
            with FileLock(f"{target}.lock"):
                found = self._read(target, path)
                if found is None:
                    found, scanned = self._build(path, on_progress)
                    _write(target, found, scanned)
                    _prune(folder, keep=target)
                    return self._read(target, path) or found  # or: an image changed just now
            return found
        except (OSError, NotImplementedError) as error:  # a full or read-only disk, or one without locks
            found = found or self._build(path, on_progress)[0]
            why = f"the lengths index cannot be kept in {folder} ({error}), so every start measures all records anew"
            return replace(found, uncached=why)

    def _folder(self, path: Path) -> Path | None:
        if self._data.lengths_cache is None or not _datasets_installed():
            return None
        return path.parent / FOLDER if self._data.lengths_cache == "auto" else Path(self._data.lengths_cache)

    def _key(self, path: Path) -> str:
        tokenizer = self._processor.tokenizer
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        limits = image_limits(self._data)
        parts = {
            "format": FORMAT,
            "content": content,
            "tutorial": self._data.prompt if path.suffix == ".json" else None,
            "root": str(image_root(path, self._data).resolve()),
            "pixels": asdict(pixel_budget(self._data)),
            "shape": asdict(self._shape),
            "limits": [limits.max_bytes, limits.url_cache is not None],
            "template": template_hash(self._processor),
            "end_token": self._data.end_token,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    def _build(self, path: Path, on_progress: Progress) -> tuple[IndexedFile, ScannedFile]:
        scanned = scan_file(path, self._data, self._shape, on_progress=on_progress)
        limits = image_limits(self._data)
        headers = HeaderReader(scanned.root, pixel_budget(self._data), self._shape, limits, sizes=scanned.sizes)
        records = [(n, row) for n, row in enumerate(scanned.rows) if isinstance(row, Record)]
        examples: list[Example] = []
        sizes: list[tuple[int, ...]] = []
        rows: list[int] = []
        places: list[str] = []
        for done, (n, record) in enumerate(records):
            for example in examples_of([record]):
                examples.append(example)
                sizes.append(size_of(self._encoder.encode(example, headers.grids(example))))
                rows.append(n)
                places.append(record.place.removeprefix(f"{path}, "))
            if done % 256 == 0 or done == len(records) - 1:
                on_progress(f"lengths of {path.name}", done + 1, len(records))
        built = IndexedFile(
            path=path,
            root=scanned.root,
            examples=MemoryFile(examples),
            lengths=Lengths.of_rows(np.array(sizes, dtype=np.int64)),
            record_rows=np.array(rows, dtype=np.int64),
            places=places,
            num_rows=len(scanned.rows),
            bad=scanned.bad,
        )
        return built, scanned

    def _read(self, target: Path, path: Path) -> IndexedFile | None:
        """The index on disk; None: there is none that is whole and still true of the images."""
        try:
            about: dict[str, Any] = json.loads((target / "index.json").read_text())
            whole = all((target / name).stat().st_size == size for name, size in about["bytes"].items())
        except (OSError, ValueError, KeyError):
            return None
        root = image_root(path, self._data)
        images = _table(target / "images.arrow") if whole else None
        if images is None or _states(images["path"].to_pylist(), root) != list(
            zip(images["bytes"].to_pylist(), images["changed_ns"].to_pylist(), strict=True)
        ):
            return None
        os.utime(target)  # pruning keeps what was used last
        table = _table(target / "examples.arrow")
        return IndexedFile(
            path=path,
            root=root,
            examples=_ArrowFile(table, _table(target / "prompts.arrow")),
            lengths=Lengths.of_rows(np.stack([table[name].to_numpy() for name in SIZES], axis=1)),
            record_rows=table["record_row"].to_numpy().astype(np.int64),
            places=_Column(table["place"]),
            num_rows=about["num_rows"],
            bad=tuple(BadRow(**row) for row in about["bad"]),
        )


class _Column(Sequence[str]):
    """A column of texts, read when asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


class _ArrowFile:
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
def _datasets_installed() -> bool:
    try:
        import datasets  # noqa: F401 - slow to import, and absent on some GPU images
    except ImportError:
        return False
    return True


def _table(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path)).data.table


def _write(target: Path, built: IndexedFile, scanned: ScannedFile) -> None:
    """All tables, then `index.json`, then the name: whole or not there. Nothing where no example is."""
    if len(built.lengths) == 0:
        return
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    temporary.mkdir()
    try:
        tables = {"prompts": _prompts_of(built), "examples": _columns_of(built), "images": _images_of(scanned)}
        for name, columns in tables.items():
            _write_table(temporary / f"{name}.arrow", columns)
        sizes = {f"{name}.arrow": (temporary / f"{name}.arrow").stat().st_size for name in tables}
        about = {"bytes": sizes, "num_rows": built.num_rows, "bad": [asdict(row) for row in built.bad]}
        (temporary / "index.json").write_text(json.dumps(about))
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_table(path: Path, columns: dict[str, tuple[str, Sequence[Any]]]) -> None:
    """A table in the form that `Dataset.from_file` maps; columns are a type by its Arrow name, and values."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({name: Value(kind) for name, (kind, _) in columns.items()})
    with ArrowWriter(path=str(path), features=features) as writer:
        writer.write_batch({name: list(values) for name, (_, values) in columns.items()})
        writer.finalize()


def _prompts_of(built: IndexedFile) -> dict[str, tuple[str, Sequence[Any]]]:
    _, first = np.unique(built.examples.prompts, return_index=True)  # numbers go up in the order they first appear
    messages = (built.examples.example(n).prompt for n in first.tolist())
    return {"messages": ("string", [json.dumps(messages_to_json(prompt), ensure_ascii=False) for prompt in messages])}


def _columns_of(built: IndexedFile) -> dict[str, tuple[str, Sequence[Any]]]:
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


def _images_of(scanned: ScannedFile) -> dict[str, tuple[str, Sequence[Any]]]:
    paths = list(scanned.sizes)
    states = _states(paths, scanned.root)
    return {
        "path": ("string", paths),
        "bytes": ("int64", [size for size, _ in states]),
        "changed_ns": ("int64", [changed for _, changed in states]),
    }


def _states(paths: Sequence[str], root: Path) -> list[tuple[int, int]]:
    """Bytes and time of change of each image; (-1, -1) where there is none, as for URLs, which are fetched only once."""
    prefix = str(root)
    return [_state(os.path.join(prefix, path)) for path in paths]  # noqa: PTH118 - a Path each would take ten times as long


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _wait_until_begun(target: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not target.is_dir() and not Path(f"{target}.lock").exists():
        time.sleep(0.05)


def _prune(folder: Path, *, keep: Path) -> None:
    """Removes the indexes used longest ago. One that another run has mapped stays readable there."""
    found = sorted((path for path in _directories(folder) if path != keep), key=lambda path: path.stat().st_mtime)
    for path in found[: -(NUM_KEPT - 1)]:
        shutil.rmtree(path, ignore_errors=True)
        Path(f"{path}.lock").unlink(missing_ok=True)


def _directories(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may be pruning too
            if path.is_dir() and not path.name.startswith("."):
                yield path
