"""Positions equal those of the installed model for any mix of text and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLForConditionalGeneration

from vl_dist.data.images import Grid
from vl_dist.data.positions import mrope_positions


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(tiny_model)


# A document: text runs, and between each two of them an image of some rows and columns of merged tokens.
documents = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)), min_size=0, max_size=4).flatmap(
    lambda images: st.tuples(st.just(images), st.integers(1, 6))
)


@settings(max_examples=150, deadline=None)
@given(document=documents)
def test_positions_equal_get_rope_index(
    model: Qwen2VLForConditionalGeneration, document: tuple[list[tuple[int, int, int]], int]
) -> None:
    images, text_after = document
    is_image: list[bool] = []
    grids = []
    for text_before, rows, columns in images:
        is_image += [False] * text_before + [True] * (rows * columns)
        grids.append(Grid(1, rows * 2, columns * 2))
    is_image += [False] * text_after
    kinds = torch.tensor([is_image], dtype=torch.int32)
    thw = torch.tensor([[g.t, g.h, g.w] for g in grids]) if grids else None
    expected, _ = model.model.get_rope_index(torch.zeros_like(kinds).long(), kinds, image_grid_thw=thw)
    positions = mrope_positions(np.array(is_image), grids, merge_size=2)
    assert torch.equal(torch.from_numpy(positions), expected[:, 0])


def test_image_tokens_that_do_not_fill_their_grid_are_caught() -> None:
    with pytest.raises(AssertionError, match="do not match"):
        mrope_positions(np.array([False, True, True, False]), [Grid(1, 4, 4)], merge_size=2)
    with pytest.raises(AssertionError, match="more image tokens"):
        mrope_positions(np.array([False, True, False]), [], merge_size=2)
