"""One document of a pack as numbers, made of the encoded examples that share its trunk.

Legend: T tokens, N targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.encode import Encoded
from vl_dist.data.images import Grid
from vl_dist.data.positions import mrope_positions


@dataclass(frozen=True, slots=True)
class DocumentSize:
    """Tokens of one document."""

    trunk: int
    branches: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the pack."""
        return self.trunk + sum(self.branches)


@dataclass(frozen=True, slots=True)
class Document:
    """One document as numbers: the trunk's rows, then each branch's. A token at row t is predicted from row t - 1."""

    input_ids: NDArray[np.int64]  # [T]
    is_image: NDArray[np.bool_]  # [T]
    positions: NDArray[np.int64]  # [3, T]
    branch_ids: NDArray[np.int64]  # [T]
    target_at: NDArray[np.int64]  # [N] rows of targets; one in the trunk stands once for each branch
    grids: tuple[Grid, ...]
    size: DocumentSize


def make_document(encoded: Sequence[Encoded], merge_size: int) -> Document:
    """One document of examples that have the same trunk.

    Args:
        encoded: of each example, trunk and branch together.
        merge_size: patches merged along each side into one language-model token.
    """
    first, trunk = encoded[0], encoded[0].num_trunk
    for other in encoded[1:]:
        assert np.array_equal(other.input_ids[: trunk + 1], first.input_ids[: trunk + 1]), "trunks differ"
    branches = tuple(one.num_tokens - trunk for one in encoded)
    # A document's first token has no row before it in its own document, so it is never a target.
    trunk_targets = np.flatnonzero(first.is_target[1:trunk]) + 1
    own_targets = [np.flatnonzero(one.is_target[trunk:]) for one in encoded]
    starts = trunk + np.cumsum([0, *branches[:-1]])
    prompt = mrope_positions(first.is_image[: trunk + 1], first.grids, merge_size)
    return Document(
        input_ids=np.concatenate([first.input_ids[:trunk], *(one.input_ids[trunk:] for one in encoded)]),
        is_image=np.concatenate([first.is_image[:trunk], np.zeros(sum(branches), dtype=np.bool_)]),
        positions=np.concatenate([prompt[:, :trunk], *(prompt[:, trunk:] + np.arange(size) for size in branches)], axis=1),
        branch_ids=np.repeat(np.arange(len(branches) + 1) * (len(branches) > 1), [trunk, *branches]),
        target_at=np.concatenate(
            [*[trunk_targets] * len(encoded), *(at + start for at, start in zip(own_targets, starts, strict=True))]
        ),
        grids=first.grids,
        size=DocumentSize(trunk, branches),
    )


def padding(num_tokens: int) -> Document:
    """A document that belongs to no example and has no target."""
    zeros = np.zeros(num_tokens, dtype=np.int64)
    positions = np.tile(np.arange(num_tokens), (3, 1))
    nothing = np.zeros(0, dtype=np.int64)
    return Document(zeros, zeros.astype(np.bool_), positions, zeros, nothing, (), DocumentSize(num_tokens, ()))
