"""The lengths index: what every example costs, known before anything is decoded. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.encode import Encoder
from vl_dist.data.images import (
    Grid,
    ImageError,
    PatchShape,
    PixelBudget,
    grid_of,
    read_size,
    resolve_path,
    to_user_error,
)
from vl_dist.data.records import Example
from vl_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sizes of N examples."""

    tokens: NDArray[np.int64]  # [N] language-model tokens, image tokens included
    targets: NDArray[np.int64]  # [N] tokens with a loss
    patches: NDArray[np.int64]  # [N] vision-tower tokens
    images: NDArray[np.int64]  # [N] images

    def __len__(self) -> int:
        return len(self.tokens)


class HeaderReader:
    """Grids of a record's images, each image's header read once."""

    def __init__(self, root: Path, budget: PixelBudget, shape: PatchShape) -> None:
        self._root = root
        self._budget = budget
        self._shape = shape
        self._grids: dict[str, Grid] = {}

    def grids(self, example: Example) -> tuple[Grid, ...]:
        """One grid for each image of the example, in order.

        Raises:
            UserError: an image is missing, unreadable, outside the root, or of an impossible shape.
        """
        return tuple(self._grid(path, example.id) for path in example.image_paths)

    def _grid(self, path: str, example_id: str) -> Grid:
        if path not in self._grids:
            try:
                self._grids[path] = grid_of(*read_size(resolve_path(path, self._root)), self._budget, self._shape)
            except ImageError as error:
                raise to_user_error(error, path, example_id) from None
        return self._grids[path]


def measure(examples: Sequence[Example], encoder: Encoder, headers: HeaderReader, *, max_tokens: int) -> Lengths:
    """Sizes of all examples, from text and image headers alone.

    Raises:
        UserError: an image cannot be used, or an example is longer than `max_tokens` (a pack).
    """
    rows = np.empty((4, len(examples)), dtype=np.int64)
    for n, example in enumerate(examples):
        encoded = encoder.encode(example, headers.grids(example))
        if encoded.num_tokens > max_tokens:
            raise UserError(
                f"Example {example.id} has {encoded.num_tokens} tokens, but a pack holds {max_tokens}. Raise "
                "batch.max_tokens_per_pack, make images smaller (data.max_pixels), or remove the record."
            )
        rows[:, n] = encoded.num_tokens, encoded.num_targets, encoded.num_patches, len(encoded.grids)
    return Lengths(*rows)
