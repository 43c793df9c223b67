"""The feature cache of a run: opened and checked at the start, read by loader workers, filled with what the tower makes.

An image that is not there yet goes through the tower as without a cache, and a thread puts what the tower made into
shards: the first epoch fills the cache, and an interrupted one leaves what it has done. `python -m vl_dist cache` fills it
ahead.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from vl_dist.data.collate import Batch
from vl_dist.data.examples import Examples
from vl_dist.data.features import SUFFIX, FeatureReader, write_shard
from vl_dist.data.loader import LoadedData
from vl_dist.data.pictures import ImageKey, image_keys
from vl_dist.errors import UserError
from vl_dist.model.features import FeatureSpace, feature_space, spot_check
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.sizes import in_bytes

SHARD_BYTES = 128 * 2**20
SHARD_S = 60.0  # what is kept in memory at most so long can be lost with the process
NUM_WAITING = 8  # packs of features that wait for the disk; more, and training waits with them
NUM_LOOKED_AT = 64  # examples among which cached images are looked for at the start
ABOUT = "about.json"


class FeatureFill:
    """Writes shards in a thread of its own; the end of its context waits for what is left."""

    def __init__(
        self,
        directory: Path,
        warn: Callable[[str], None],
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_s: float = SHARD_S,
        write: Callable[[Path, Sequence[tuple[str, torch.Tensor]]], Any] = write_shard,
    ) -> None:
        """
        Args:
            directory: of the feature space.
            warn: told once why no more is written.
            shard_bytes: size of a shard.
            shard_s: a smaller one is written after so many seconds.
            write: puts images on disk; raises OSError.
        """
        self.failure: str | None = None
        self._directory = directory
        self._warn = warn
        self._warned = False
        self._shard_bytes, self._shard_s = shard_bytes, shard_s
        self._write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._waiting: list[Future[None]] = []
        self._seen: set[str] = set()
        self._kept: list[tuple[str, torch.Tensor]] = []  # of the thread, like what follows
        self._kept_since = 0.0

    def __enter__(self) -> "FeatureFill":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waiting.append(self._thread.submit(self._flush))
        self._wait_until_fewer_than(1)
        self._thread.shutdown()

    def __call__(self, batch: Batch, features: torch.Tensor) -> None:
        """Takes what the tower made of a pack's images, without waiting for the device.

        Args:
            batch: the pack; an idle image of it has no key.
            features: [V, H] on any device, of the images that went through the tower, in order.
        """
        new = [n for n, key in enumerate(batch.image_keys) if key not in self._seen]
        if not new or self.failure is not None:
            self._warn_once()
            return
        self._seen.update(batch.image_keys)
        host = features.detach().to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(features.device).record_event() if features.is_cuda else None
        self._wait_until_fewer_than(NUM_WAITING)
        self._waiting.append(self._thread.submit(self._add, batch, new, host, copied))

    def _add(self, batch: Batch, new: Sequence[int], features: torch.Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        parts: Sequence[torch.Tensor] = torch.split(features, _tokens_of(batch, len(features)))
        if not self._kept:
            self._kept_since = time.monotonic()
        self._kept += [(batch.image_keys[n], parts[n]) for n in new]
        num_bytes = sum(part.nbytes for _, part in self._kept)
        if num_bytes >= self._shard_bytes or time.monotonic() - self._kept_since >= self._shard_s:
            self._flush()

    def _flush(self) -> None:
        kept, self._kept = self._kept, []
        if not kept or self.failure is not None:
            return
        try:
            self._write(self._directory, kept)
        except OSError as error:
            self.failure = str(error)

    def _wait_until_fewer_than(self, count: int) -> None:
        while len(self._waiting) >= count:
            self._waiting.pop(0).result()  # raises what was our own mistake
        self._warn_once()

    def _warn_once(self) -> None:
        if self.failure is not None and not self._warned:
            self._warned = True
            self._warn(
                f"The feature cache takes no more images ({self.failure}). Training goes on: those that are not in "
                f"{self._directory} go through the vision tower each time."
            )


@dataclass(frozen=True, slots=True)
class OpenCache:
    """A cache that can be read and filled."""

    directory: Path
    space: FeatureSpace
    reader: FeatureReader
    difference: float | None  # of cached features from a live pass, relative; None: none is there


def open_cache(root: Path, model: PackedModel, data: LoadedData, ranks: Ranks, say: Callable[[str], None]) -> OpenCache:
    """The directory of this model's features, made or checked (all ranks).

    Args:
        root: `model.feature_cache`.
        model: on its device, not wrapped.
        data: what will be trained on.
        say: told what a person should know.

    Raises:
        UserError: the tower trains, the directory cannot be made, or it holds other features than the tower makes.
    """
    space = ranks.on_main(lambda: feature_space(model, data.collator.pictures.image_processor))
    directory = root / space.key
    reader = FeatureReader(directory, width=space.width, dtype=space.dtype)

    def check() -> float | None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"model.feature_cache={root}: the folder cannot be made ({error.strerror}). Give another, or null for none."
            ) from None
        examples = [data.examples[n] for n in np.linspace(0, len(data.examples) - 1, NUM_LOOKED_AT, dtype=int).tolist()]
        images = list(dict.fromkeys(key for example in examples for key in image_keys(example)))
        return spot_check(model, data.collator, reader, images)

    difference = max((found for found in ranks.gather([ranks.each(check)]) if found is not None), default=None)
    if ranks.is_main:
        _begin(directory, space, reader, say)
    return OpenCache(directory, space, reader, difference)


def fill_while_training(
    root: Path, model: PackedModel, data: LoadedData, ranks: Ranks, say: Callable[[str], None]
) -> tuple[LoadedData, FeatureFill]:
    """The training data with a collator that reads the cache, and what fills it: a context around the loop (all ranks).

    Raises:
        UserError: as `open_cache`.
    """
    cache = open_cache(root, model, data, ranks, say)
    checked = "" if cache.difference is None else f"; some were compared with a live pass: {cache.difference:.0e} apart"
    say(
        f"Feature cache: {cache.directory} has {len(cache.reader.keys()):,} images{checked}. Images that it lacks go "
        "through the tower and are added."
    )
    fill = FeatureFill(cache.directory, say if ranks.is_main else _warning_of_a_node(ranks))
    model.keep_features = fill
    return replace(data, collator=data.collator.reading(cache.reader)), fill


def _warning_of_a_node(ranks: Ranks) -> Callable[[str], None]:
    """The first rank of another node speaks too: its disk may be another."""
    return logging.getLogger(__name__).warning if ranks.is_first_of_node else lambda text: None


def distinct_images(data: LoadedData, max_patches: int) -> tuple[list[list[ImageKey]], int]:
    """All images of the examples in portions, and how many tokens they make.

    Args:
        max_patches: of a portion; one example's images may have more.
    """
    assert isinstance(data.examples, Examples)
    _, first = np.unique(data.examples.trunks(), return_index=True)
    portions: list[list[ImageKey]] = [[]]
    seen: set[ImageKey] = set()
    num_patches = in_portion = 0
    for n in np.sort(first).tolist():
        keys = image_keys(data.examples[n])
        new = [key for key in dict.fromkeys(keys) if key not in seen]
        if not new:
            continue
        patches = int(data.lengths.patches[n]) * len(new) // len(keys)
        if portions[-1] and in_portion + patches > max_patches:
            portions.append([])
            in_portion = 0
        seen.update(new)
        portions[-1] += new
        in_portion += patches
        num_patches += patches
    return [portion for portion in portions if portion], num_patches // data.collator.shape.merge_size**2


def _begin(directory: Path, space: FeatureSpace, reader: FeatureReader, say: Callable[[str], None]) -> None:
    """Removes what is damaged, and says what else lies there (main process)."""
    damaged = reader.damaged()
    with contextlib.suppress(OSError):  # a cache that can only be read is one too
        for shard in damaged:
            shard.unlink(missing_ok=True)
        (directory / ABOUT).write_text(json.dumps(space.settings, indent=1, default=str) + "\n")
    if damaged:
        say(f"Feature cache: damaged shards: {len(damaged)}, first {damaged[0].name}. Their images are encoded again.")
    others = [path for path in directory.parent.iterdir() if path != directory and (path / ABOUT).is_file()]
    if others:
        size = sum(shard.stat().st_size for path in others for shard in path.glob(f"*{SUFFIX}"))
        say(
            f"Feature cache: {directory.parent} also has features of {len(others)} other towers, precisions or pixel "
            f"settings ({in_bytes(size)}), which this run does not use; {ABOUT} in each says which."
        )


def free_bytes(directory: Path) -> int:
    """What the disk of a directory still takes."""
    return shutil.disk_usage(directory).free


def _tokens_of(batch: Batch, num_tokens: int) -> list[int]:
    """Image tokens of each image that went through the tower."""
    total = sum(batch.image_patches)
    return [patches * num_tokens // total for patches in batch.image_patches]
