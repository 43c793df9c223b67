"""`python -m vl_dist cache`: the frozen features of all training images, ahead of training, by one process or many."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vl_dist.config import load, split_words
from vl_dist.errors import UserError
from vl_dist.settings import Config
from vl_dist.sizes import in_bytes

if TYPE_CHECKING:
    from vl_dist.run.distributed import Ranks

MAX_PATCHES = 16_384  # that go through the tower together


@dataclass(frozen=True, slots=True)
class Filled:
    """What was done, over all ranks."""

    directory: str
    num_images: int
    num_added: int
    num_bytes: int  # of all images' features
    bad: tuple[str, ...]  # images that cannot be used, and why


def add_command(commands: Any) -> None:
    """Adds `cache` to the commands of an argparse parser."""
    what = "compute frozen image features ahead of training, on one process or launched on many"
    parser = commands.add_parser("cache", help=what)
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="as for train.py")
    parser.set_defaults(run=_cache)


def _cache(arguments: argparse.Namespace) -> None:
    """The same on every rank; the main process speaks."""
    from vl_dist.evaluate.records import plain_launch  # torch is slow to import; other commands do without
    from vl_dist.run.distributed import Ranks, said_once

    recipe, words = split_words(arguments.words)
    config = load(recipe, words)
    if config.model.feature_cache is None:
        raise UserError("model.feature_cache is null; it says where the features go. Add model.feature_cache=FOLDER.")
    ranks = Ranks.start(plain_launch(os.environ, "cache"), cpu_threads=config.run.cpu_threads)
    with said_once(ranks):
        _fill_and_tell(config, ranks)
    ranks.close()


def _fill_and_tell(config: Config, ranks: "Ranks") -> None:
    from rich.console import Console

    from vl_dist.evaluate.command import progress

    console = Console(highlight=False, quiet=not ranks.is_main)
    started = time.perf_counter()
    with progress("images", 0, shown=ranks.is_main) as bar:
        found = fill(
            config, ranks, say=lambda text: console.print(text, markup=False, soft_wrap=True), on_progress=bar.of_total
        )
    console.print(
        f"{found.num_images:,} images, {found.num_added:,} of them added, {in_bytes(found.num_bytes)} of features, "
        f"{time.perf_counter() - started:.0f} s: {found.directory}",
        soft_wrap=True,
    )
    if found.bad:
        console.print(f"{len(found.bad):,} images cannot be used, first {found.bad[0]}.", markup=False, soft_wrap=True)


def fill(config: Config, ranks: "Ranks", *, say: Callable[[str], None], on_progress: Callable[[int, int], None]) -> Filled:
    """Every image's features into the cache; what is there already is only looked up (all ranks).

    Raises:
        UserError: as for training, or the disk is too small.
    """
    from vl_dist.data.loader import load_images
    from vl_dist.model.load import load_processor, patch_shape
    from vl_dist.run.build import load_data, load_model, model_directory
    from vl_dist.run.features import FeatureFill, distinct_images, open_cache

    assert config.model.feature_cache is not None
    model_dir = model_directory(config, ranks, say)
    processor = load_processor(model_dir)
    data = load_data(config, processor, patch_shape(model_dir, processor), ranks, lambda what, done, total: None).train
    model = load_model(config, model_dir, ranks.device)
    cache = open_cache(config.model.feature_cache, model, data, ranks, say)
    portions, num_tokens = distinct_images(data, MAX_PATCHES)
    size = cache.space.bytes_of(num_tokens)
    ranks.on_main(lambda: _refuse_small_disk(cache.directory, size))
    own = portions[ranks.rank :: ranks.world_size]
    warned: list[str] = []
    counts, bad = [0, 0], []
    model.keep_features = writer = FeatureFill(cache.directory, warned.append)
    with writer:
        packs = load_images(own, data.collator.reading(cache.reader), num_workers=config.data.num_workers)
        for done, (portion, pack) in enumerate(zip(own, packs, strict=True), 1):
            model.encode_only(pack.to(ranks.device))
            counts[0] += len(portion)
            counts[1] += pack.num_encoded_images
            bad += [f"{one.id}: {one.reason}" for one in pack.dropped]
            on_progress(done, len(own))
            if warned:
                break
    ranks.each(lambda: _raise_first(warned))
    num_images, num_added = ranks.counts(*counts)
    return Filled(str(cache.directory), num_images, num_added, size, tuple(ranks.gather(bad)))


def _refuse_small_disk(directory: Any, size: int) -> None:
    from vl_dist.data.features import SUFFIX
    from vl_dist.run.features import free_bytes

    there = sum(shard.stat().st_size for shard in directory.glob(f"*{SUFFIX}"))
    missing, free = size - there, free_bytes(directory)
    if missing > free:
        raise UserError(
            f"The features of all images take {in_bytes(size)}, of which {in_bytes(there)} are there, and the disk of "
            f"{directory} has {in_bytes(free)} left. Free some, or give another model.feature_cache; training works "
            "without one."
        )


def _raise_first(warned: list[str]) -> None:
    if warned:
        raise UserError(warned[0])
