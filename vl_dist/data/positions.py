"""Positions and documents of a pack, as plain integers on the CPU.

Qwen2-VL rotates each head by three position ids (M-RoPE: temporal, row, column). Text advances all three together; an
image spreads them over its grid of merged patches, and text goes on after the largest id used so far.

Legend: T tokens, I images, P patches.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.images import Grid


def mrope_positions(is_image: NDArray[np.bool_], grids: Sequence[Grid], merge_size: int) -> NDArray[np.int64]:
    """M-RoPE ids of one document.

    Source: `Qwen2VLModel.get_rope_index` (transformers 5.23), which a test compares.

    Args:
        is_image: [T], true where an image's features stand.
        grids: the I images in order; their tokens must fill the true rows of `is_image` exactly.
        merge_size: patches merged along each side into one token.

    Returns:
        [3, T]: temporal, row and column ids.
    """
    num_tokens = len(is_image)
    positions = np.empty((3, num_tokens), dtype=np.int64)
    row, next_position = 0, 0
    for grid in grids:
        start = row + int(np.argmax(is_image[row:]))
        _fill_text(positions, row, start, next_position)
        next_position += start - row
        rows, columns = grid.h // merge_size, grid.w // merge_size
        ids = np.indices((grid.t, rows, columns)).reshape(3, -1)
        end = start + ids.shape[1]
        assert bool(is_image[start:end].all()) and end - start == ids.shape[1], "image tokens do not match their grid"
        positions[:, start:end] = ids + next_position
        next_position += max(rows, columns)
        row = end
    assert not is_image[row:].any(), "more image tokens than grids"
    _fill_text(positions, row, num_tokens, next_position)
    return positions


def patch_positions(grids: Sequence[Grid], merge_size: int) -> NDArray[np.int64]:
    """Where each patch lies in its image; the patches that merge into one token come one after the other.

    Source: `get_vision_position_ids` (transformers 5.23), which a test compares.

    Returns:
        [2, P]: row and column of the P patches of all images.
    """
    found = [np.empty((2, 0), dtype=np.int64)]
    for grid in grids:
        places = np.indices((grid.h, grid.w), dtype=np.int64)
        blocks = places.reshape(2, grid.h // merge_size, merge_size, grid.w // merge_size, merge_size)
        found += [blocks.transpose(0, 1, 3, 2, 4).reshape(2, -1)] * grid.t
    return np.concatenate(found, axis=1)


def _fill_text(positions: NDArray[np.int64], start: int, end: int, first: int) -> None:
    positions[:, start:end] = np.arange(first, first + end - start)
