"""The lengths index of a record file: its examples and what each costs, from text and image headers alone.

Where `datasets` is installed the index is kept on disk as Arrow tables, which are memory-mapped: a warm start parses no
record, reads no image and tokenises nothing, and ranks and loader workers of one machine share its pages. It is named by a
hash of all that changes it, and images are looked at for another size or time. One process builds while others wait on a
file lock, not in a collective, so that it does not matter how long that takes. Elsewhere every process builds its own in
memory.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vl_dist.data.encode import Encoder, template_hash
from vl_dist.data.examples import MemoryFile
from vl_dist.data.images import PatchShape
from vl_dist.data.index_tables import IndexedFile, datasets_installed, read_tables, write_tables
from vl_dist.data.lengths import HeaderReader, Lengths, size_of
from vl_dist.data.records import Example, Record, examples_of
from vl_dist.data.validate import Progress, image_limits, image_root, pixel_budget, scan_file
from vl_dist.settings import DataConfig

FORMAT = 1  # of the tables, and of everything that decides on a length and is not in the key
FOLDER = ".lengths"  # beside the record file
NUM_KEPT = 8  # indexes in a folder; settings that are tried out leave one each


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
                    found, images = self._build(path, on_progress)
                    write_tables(target, found, images)
                    _prune(folder, keep=target)
                    return self._read(target, path) or found  # or: an image changed just now
            return found
        except (OSError, NotImplementedError) as error:  # a full or read-only disk, or one without locks
            found = found or self._build(path, on_progress)[0]
            why = f"the lengths index cannot be kept in {folder} ({error}), so every start measures all records anew"
            return replace(found, uncached=why)

    def _folder(self, path: Path) -> Path | None:
        if self._data.lengths_cache is None or not datasets_installed():
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

    def _build(self, path: Path, on_progress: Progress) -> tuple[IndexedFile, list[str]]:
        """The index in memory, and the paths of all images."""
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
        return built, list(scanned.sizes)

    def _read(self, target: Path, path: Path) -> IndexedFile | None:
        """The index on disk; None: there is none that is whole and still true of the images."""
        found = read_tables(target, path, image_root(path, self._data))
        if found is not None:
            os.utime(target)  # pruning keeps what was used last
        return found


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
