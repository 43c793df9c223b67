"""The lengths index: what every example costs, known before anything is decoded. No torch here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.encode import Encoded, Encoder
from vl_dist.data.examples import Examples
from vl_dist.data.image_files import DEFAULT_LIMITS, ImageLimits, load_image, read_size, resolve_path
from vl_dist.data.images import (
    Grid,
    ImageError,
    PatchShape,
    PixelBudget,
    area_bounds,
    grid_of,
    named,
    to_user_error,
    within,
)
from vl_dist.data.records import Example, Record
from vl_dist.errors import UserError

Size = tuple[int, int]  # upright height and width in pixels
Sizes = Mapping[str, Size | ImageError]  # by the path that records give; an error where the file cannot be used
Overflow = Literal["error", "drop", "shrink_images"]

# Headers of 2,000 JPEGs on two cores, in memory: 0.23 s in one thread, 0.30 s in 8, 0.79 to 1.3 s in two new processes; to
# decode 400 of them: 0.76 s, 0.40 to 0.49 s, 0.76 to 0.81 s. On a network disk, threads also wait for many files at once.
NUM_THREADS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sizes of N examples."""

    tokens: NDArray[np.int64]  # [N] language-model tokens, image tokens included
    targets: NDArray[np.int64]  # [N] tokens with a loss
    patches: NDArray[np.int64]  # [N] vision-tower tokens
    images: NDArray[np.int64]  # [N] images
    trunk: NDArray[np.int64]  # [N] tokens that examples of the same group share (`Encoded.num_trunk`)
    group: NDArray[np.int64]  # [N] the group each is of, from 0; without sharing its own

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]] | NDArray[np.int64]) -> "Lengths":
        """From rows of tokens, targets, patches, images and trunk; nothing is shared."""
        tokens, targets, patches, images, trunk = np.array(rows, dtype=np.int64).reshape(-1, 5).T.copy()
        return cls(tokens, targets, patches, images, trunk, np.arange(len(tokens)))

    @property
    def columns(self) -> NDArray[np.int64]:
        """[N, 5], as `of_rows` takes them."""
        return np.stack([self.tokens, self.targets, self.patches, self.images, self.trunk], axis=1)


@dataclass(frozen=True, slots=True)
class Dropped:
    """An example that no step trains, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """Examples that fit into a pack, with their sizes; some may have got a smaller pixel budget."""

    examples: Examples
    lengths: Lengths
    dropped: tuple[Dropped, ...]


def read_sizes(
    paths: Iterable[str],
    root: Path,
    limits: ImageLimits = DEFAULT_LIMITS,
    *,
    decode: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sizes:
    """The size of every image, each file read once, or why it cannot be used.

    Args:
        decode: decode all pixels too, which finds files that are cut short.
        on_progress: called with the images read and all images.
    """
    distinct = list(dict.fromkeys(paths))

    def read(path: str) -> Size | ImageError:
        try:
            file = resolve_path(path, root, limits)
            if not decode:
                return read_size(file)
            image = load_image(file)
            return image.height, image.width
        except ImageError as error:
            return error

    found: dict[str, Size | ImageError] = {}
    on_progress(0, len(distinct))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for path, size in zip(distinct, pool.map(read, distinct), strict=True):
            found[path] = size
            on_progress(len(found), len(distinct))
    return found


class HeaderReader:
    """Grids of a record's images, each image's header read once."""

    def __init__(
        self,
        root: Path,
        budget: PixelBudget,
        shape: PatchShape,
        limits: ImageLimits = DEFAULT_LIMITS,
        *,
        sizes: Sizes | None = None,
    ) -> None:
        """
        Args:
            root: image paths are relative to it.
            budget: the size of every image, but of those whose example has a smaller one of its own.
            limits: which files are accepted.
            sizes: those that were read before.
        """
        self.budget = budget
        self.shape = shape
        self._root = root
        self._limits = limits
        self._sizes = dict(sizes or {})

    def grids(self, example: Example) -> tuple[Grid, ...]:
        """One grid for each image of the example, in order.

        Raises:
            UserError: an image is missing, unreadable, outside the root, or of an impossible shape.
        """
        grids = []
        for path in example.image_paths:
            try:
                grids.append(self._grid(path, within(self.budget, example.max_pixels)))
            except ImageError as error:
                raise to_user_error(error, path, example.id) from None
        return tuple(grids)

    def fault(self, record: Record | Example) -> str | None:
        """Why the first of its images that cannot be used cannot be; None: all can."""
        budget = within(self.budget, record.max_pixels if isinstance(record, Example) else None)
        for path in record.image_paths:
            try:
                self._grid(path, budget)
            except ImageError as error:
                return named(error, path)
        return None

    def num_image_tokens(self, example: Example, max_pixels: int) -> int:
        """Tokens of the example's images under another bound on their area; too narrow ones have none."""
        total = 0
        for path in example.image_paths:
            try:
                total += self._grid(path, within(self.budget, max_pixels)).num_tokens(self.shape.merge_size)
            except ImageError:
                continue
        return total

    def _grid(self, path: str, budget: PixelBudget) -> Grid:
        if path not in self._sizes:
            self._sizes |= read_sizes([path], self._root, self._limits)
        size = self._sizes[path]
        if isinstance(size, ImageError):
            raise size
        return grid_of(*size, budget, self.shape)


def size_of(encoded: Encoded) -> tuple[int, int, int, int, int]:
    """One row of `Lengths.of_rows`."""
    return encoded.num_tokens, encoded.num_targets, encoded.num_patches, len(encoded.grids), encoded.num_trunk


def measure(examples: Iterable[Example], encoder: Encoder, headers: HeaderReader) -> Lengths:
    """Sizes of all examples, from text and image headers alone, however long they are.

    Raises:
        UserError: an image cannot be used.
    """
    return Lengths.of_rows([size_of(encoder.encode(example, headers.grids(example))) for example in examples])


def fit(
    examples: Examples,
    lengths: Lengths,
    encoder: Encoder,
    headers: Sequence[HeaderReader],
    *,
    max_tokens: int,
    overflow: Overflow,
) -> Fitted:
    """What fits into a pack, after dealing with examples that are longer. Nothing is ever cut.

    Every example has targets, since each answer has an end token.

    Args:
        lengths: of these examples.
        headers: one for each file of the examples.
        max_tokens: what a pack holds.
        overflow: what to do with a longer example: refuse all, leave it out, or shrink its images.

    Raises:
        UserError: an example is too long and `overflow` is `error`.
    """
    kept = np.ones(len(examples), dtype=np.bool_)
    smaller: dict[int, tuple[int, tuple[int, ...]]] = {}  # by example: its bound in pixels, and its new sizes
    dropped: list[Dropped] = []
    for n in np.flatnonzero(lengths.tokens > max_tokens).tolist():
        example = examples[n]
        too_long = f"has {lengths.tokens[n]} tokens, but a pack holds {max_tokens}"
        if overflow == "error":
            raise UserError(
                f"Example {example.id} {too_long}. Raise batch.max_tokens_per_pack, make images smaller "
                "(data.max_pixels), set data.overflow, or remove the record."
            )
        reader = headers[example.file]
        shrunk = shrink(example, encoder, reader, max_tokens) if overflow == "shrink_images" else too_long
        if isinstance(shrunk, str):
            kept[n] = False
            dropped.append(Dropped(example.id, shrunk))
        else:
            smaller[n] = shrunk.max_pixels or 0, size_of(encoder.encode(shrunk, reader.grids(shrunk)))
            assert smaller[n][0] > 0 and smaller[n][1][0] <= max_tokens, "the shrunk example does not fit"
    if not smaller and not dropped:
        return Fitted(examples, lengths, ())
    columns = lengths.columns
    for n, (_, sizes) in smaller.items():
        columns[n] = sizes
    bounds = {n: area for n, (area, _) in smaller.items()}
    indices = np.flatnonzero(kept)
    return Fitted(examples.chosen(indices, bounds), Lengths.of_rows(columns[indices]), tuple(dropped))


def shrink(example: Example, encoder: Encoder, headers: HeaderReader, max_tokens: int) -> Example | str:
    """The example with the largest common bound on its images' areas under which it fits, or why there is none.

    A function of the example, its headers and the settings alone, so that every rank and every start finds the same.
    """
    encoded = encoder.encode(example, headers.grids(example))
    area = headers.shape.factor**2  # pixels that stand for one token
    image_tokens = sum(grid.num_tokens(headers.shape.merge_size) for grid in encoded.grids)
    room = max_tokens - (encoded.num_tokens - image_tokens)
    low, high = area_bounds(headers.budget, headers.shape)
    least, most = math.ceil(low / area), high // area  # in tokens of one image; more never fits where fewer do not
    if headers.num_image_tokens(example, max(low, least * area)) > room:
        text = encoded.num_tokens - image_tokens
        return f"has {text} tokens of text, and no room in a pack of {max_tokens} for its images however small"
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if headers.num_image_tokens(example, middle * area) <= room else (least, middle - 1)
    smaller = replace(example, max_pixels=least * area)
    return headers.fault(smaller) or smaller
