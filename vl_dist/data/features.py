"""The feature cache on disk: what the frozen tower makes of each image, in shards that are memory-mapped.

A shard is a safetensors file with one tensor, `features` [rows, H], and in its metadata which rows are which image's, with
a CRC-32 of each. Shards are written whole and never changed, so that any number of processes may add and read at once; a
file that is cut or altered costs its images another pass through the tower, and nothing else. A feature is named by the
bytes of its image file and the grid it is cut into; what else it depends on names the directory (`model.features`).

Legend: V image tokens of one image, H hidden size of the language model.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vl_dist.data.images import Grid
from vl_dist.file_modes import give_usual_mode

SUFFIX = ".safetensors"
INDEX = "images"  # key of the metadata
SETTLED_S = 2.0  # a directory changed more recently may change again within the resolution of its time


@dataclass(frozen=True, slots=True)
class Place:
    """Where the features of one image are."""

    shard: str
    start: int
    stop: int
    checksum: int


def feature_key(content: bytes, grid: Grid) -> str:
    """The name of an image's features: what its file holds, and the grid its pixels are resized to."""
    return f"{hashlib.sha256(content).hexdigest()[:32]}-{grid.h}x{grid.w}"


def checksum(features: torch.Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    return zlib.crc32(bytes_of(features))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied where they lie together."""
    values: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)


def write_shard(directory: Path, features: Sequence[tuple[str, torch.Tensor]]) -> Path:
    """Adds a shard.

    Args:
        features: of each image its key and [V, H] on the CPU, all of one precision.

    Raises:
        OSError: the disk does not take it; nothing of it is left then.
    """
    start, places = 0, {}
    for key, tensor in features:
        places[key] = (start, start + len(tensor), checksum(tensor))
        start += len(tensor)
    joined = torch.cat([tensor for _, tensor in features])
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"  # names sort by age, and no two writers agree on one
    partial, shard = directory / f".{name}.partial", directory / f"{name}{SUFFIX}"
    try:
        save_file({"features": joined}, partial, metadata={INDEX: json.dumps(places)})
        give_usual_mode(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(shard)
    except SafetensorError as error:  # wraps what the file system said
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)
    return shard


class FeatureReader:
    """The features of one directory, those included that are added while it is read. One copy in every loader worker."""

    def __init__(self, directory: Path, *, width: int, dtype: torch.dtype) -> None:
        """
        Args:
            width: H.
            dtype: precision of the features.
        """
        self.directory = directory
        self._width = width
        self._dtype = dtype
        self._shards: dict[str, Any] = {}  # open ones; None: damaged
        self._places: dict[str, Place] = {}
        self._seen_ns: int | None = None  # the directory's time of change when it was last read

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process it begins anew: what is mapped here is not there."""
        return self.__dict__ | {"_shards": {}, "_places": {}, "_seen_ns": None}

    def get(self, key: str) -> torch.Tensor | None:
        """[V, H] of an image; None: they are not there, or not what was written."""
        if key not in self._places:
            self._look_for_new_shards()
        place = self._places.get(key)
        if place is None:
            return None
        found: torch.Tensor = self._shards[place.shard].get_slice("features")[place.start : place.stop]
        if checksum(found) != place.checksum:
            del self._places[key]
            return None
        return found

    def keys(self) -> frozenset[str]:
        """Images whose features are there."""
        self._look_for_new_shards()
        return frozenset(self._places)

    def damaged(self) -> list[Path]:
        """Shards that cannot be read at all."""
        self._look_for_new_shards()
        return [self.directory / name for name, shard in sorted(self._shards.items()) if shard is None]

    def _look_for_new_shards(self) -> None:
        try:
            changed_ns = self.directory.stat().st_mtime_ns
            if changed_ns == self._seen_ns:
                return
            settled = time.time_ns() - changed_ns > SETTLED_S * 1e9
            names = sorted(path.name for path in self.directory.iterdir() if path.suffix == SUFFIX)
        except OSError:
            return
        self._open(name for name in names if name not in self._shards)
        self._seen_ns = changed_ns if settled else None

    def _open(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                shard: Any = safe_open(str(self.directory / name), "pt")
                places = json.loads(shard.metadata()[INDEX])
                rows, width = shard.get_slice("features").get_shape()
                fits = width == self._width and all(0 <= start <= stop <= rows for start, stop, _ in places.values())
                same = shard.get_slice("features")[:0].dtype == self._dtype
            except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
                self._shards[name] = None
                continue
            self._shards[name] = shard if fits and same else None
            if fits and same:
                self._places |= {key: Place(name, *place) for key, place in places.items()}
