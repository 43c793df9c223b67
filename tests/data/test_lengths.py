"""Lengths: from headers alone, equal to what is trained, and within a pack by the rule that was asked for."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.examples import SEVEN
from vl_dist.data.collate import Collator
from vl_dist.data.examples import in_memory
from vl_dist.data.images import ImageError, PatchShape, PixelBudget
from vl_dist.data.lengths import Fitted, HeaderReader, Overflow, fit, measure, read_sizes
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.errors import UserError


@pytest.fixture
def headers(photos: Path, shape: PatchShape, collator: Collator) -> HeaderReader:
    return HeaderReader(photos, collator.budget, shape)


def fitted(collator: Collator, headers: HeaderReader, max_tokens: int, overflow: Overflow) -> Fitted:
    return fit_all(SEVEN, collator, headers, max_tokens, overflow)


def fit_all(
    examples: Sequence[Example], collator: Collator, headers: HeaderReader, max_tokens: int, overflow: Overflow
) -> Fitted:
    lengths = measure(examples, collator.encoder, headers)
    chosen = in_memory(examples)
    return fit(chosen, lengths, collator.encoder, [headers], max_tokens=max_tokens, overflow=overflow)


def test_what_fits_is_left_alone_by_every_rule(collator: Collator, headers: HeaderReader) -> None:
    for overflow in ("error", "drop", "shrink_images"):
        found = fitted(collator, headers, 150, overflow)
        assert (list(found.examples), found.dropped) == (SEVEN, ())


def test_too_long_examples_are_dropped_and_counted_with_both_lengths(collator: Collator, headers: HeaderReader) -> None:
    tokens = {example.id: int(n) for example, n in zip(SEVEN, measure_all(collator, headers), strict=True)}
    found = fitted(collator, headers, 40, "drop")
    assert [example.id for example in found.examples] == [name for name, n in tokens.items() if n <= 40]
    assert [one.id for one in found.dropped] == [name for name, n in tokens.items() if n > 40]
    assert found.dropped[0].reason == f"has {tokens[found.dropped[0].id]} tokens, but a pack holds 40"
    assert len(found.examples) == len(found.lengths) > 0
    assert found.lengths.tokens.max() <= 40


def measure_all(collator: Collator, headers: HeaderReader) -> list[int]:
    return measure(SEVEN, collator.encoder, headers).tokens.tolist()


@pytest.mark.parametrize("max_tokens", [32, 36, 40, 44, 50])
def test_images_shrink_to_what_fits_and_the_collator_makes_the_same_size_of_them(
    collator: Collator, headers: HeaderReader, max_tokens: int
) -> None:
    found = fitted(collator, headers, max_tokens, "shrink_images")
    for n, example in enumerate(found.examples):
        batch = collator.pack([example])
        sizes = (found.lengths.tokens[n], found.lengths.targets[n], found.lengths.patches[n], found.lengths.images[n])
        assert (batch.num_tokens, batch.num_targets, batch.num_patches, batch.num_images) == sizes
        assert batch.num_tokens <= max_tokens
    assert len(found.examples) + len(found.dropped) == len(SEVEN)
    assert any(example.max_pixels is not None for example in found.examples)
    assert list(found.examples) == list(fitted(collator, headers, max_tokens, "shrink_images").examples)


def test_images_shrink_no_more_than_they_must(collator: Collator, headers: HeaderReader, shape: PatchShape) -> None:
    """Against every bound in steps of one token."""
    num_shrunk = 0
    for max_tokens in range(32, max(measure_all(collator, headers))):
        found = fitted(collator, headers, max_tokens, "shrink_images")
        for n, example in enumerate(found.examples):
            if example.max_pixels is None:
                continue
            text = int(found.lengths.tokens[n]) - headers.num_image_tokens(example, example.max_pixels)
            bounds = [count * shape.factor**2 for count in range(4, 13)]  # 84 x 112 pixels are 12 tokens
            fitting = [bound for bound in bounds if text + headers.num_image_tokens(example, bound) <= max_tokens]
            assert example.max_pixels == max(fitting)
            num_shrunk += 1
    assert num_shrunk > 10


def test_text_that_leaves_no_room_for_its_images_is_dropped_with_the_reason(
    collator: Collator, headers: HeaderReader
) -> None:
    found = fitted(collator, headers, 30, "shrink_images")
    reasons = {one.id: one.reason for one in found.dropped}
    assert "tokens of text, and no room in a pack of 30" in reasons["both"]
    assert "tokens of text, and no room in a pack of 30" in reasons["long"]


def test_a_lower_bound_that_was_asked_for_is_kept(collator: Collator, photos: Path, shape: PatchShape) -> None:
    example = Example("a", (Message("user", (ImagePart("cat.jpg"), TextPart("COCO Yes:"))),), "A man.")
    generous = HeaderReader(photos, PixelBudget(max_pixels=84 * 112), shape)
    strict = HeaderReader(photos, PixelBudget(min_pixels=84 * 84, max_pixels=84 * 112), shape)
    needed = int(measure([example], collator.encoder, generous).tokens[0])
    for headers, num_kept in ((generous, 1), (strict, 0)):
        found = fit_all([example], collator, headers, needed - 4, "shrink_images")
        assert len(found.examples) == num_kept


def test_each_image_is_read_once_and_a_fault_is_a_value(tmp_path: Path, photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    paths = ["cat.jpg", "absent.jpg", "cat.jpg"]
    sizes = read_sizes(paths, photos, on_progress=lambda done, total: seen.append((done, total)))
    assert sizes["cat.jpg"] == (300, 451)
    assert isinstance(sizes["absent.jpg"], ImageError)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    (tmp_path / "cut.jpg").write_bytes((photos / "cat.jpg").read_bytes()[:5000])
    assert read_sizes(["cut.jpg"], tmp_path)["cut.jpg"] == (300, 451)
    assert isinstance(read_sizes(["cut.jpg"], tmp_path, decode=True)["cut.jpg"], ImageError)


def test_grids_of_an_unusable_image_name_image_and_example(photos: Path, shape: PatchShape) -> None:
    example = Example("e", (Message("user", (ImagePart("absent.jpg"),)),), "A cat.")
    headers = HeaderReader(photos, PixelBudget(), shape)
    with pytest.raises(UserError, match=r"Example e: image absent\.jpg: there is no such file"):
        headers.grids(example)
    assert headers.fault(example) is not None


@pytest.mark.parametrize("module", ["lengths", "validate", "validate_command", "image_files", "index", "plan", "assign"])
def test_lengths_need_no_torch(module: str) -> None:
    code = f"import sys, vl_dist.data.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
