"""The embedded default's data: captions that name everything, made the same each time."""

import hashlib
from dataclasses import astuple
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vl_dist.data.record_files import read_records
from vl_dist.errors import UserError
from vl_dist.evaluate.scores import exact_match
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import all_drawings, draw, make_shapes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    make_shapes(ShapesConfig(dir=directory, num_train=30, num_eval=10))
    return directory


def digest(directory: Path) -> str:
    parts = [path.relative_to(directory).as_posix().encode() + path.read_bytes() for path in sorted(directory.rglob("*.*"))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_what_is_made_is_said_and_what_gave_way_to_it(tmp_path: Path) -> None:
    directory = tmp_path / "shapes"
    first = make_shapes(ShapesConfig(dir=directory, num_train=3, num_eval=1))
    assert first == f"Made 4 drawings and the tiny model in {directory}."
    assert make_shapes(ShapesConfig(dir=directory, num_train=3, num_eval=1)) is None
    again = make_shapes(ShapesConfig(dir=directory, num_train=3, num_eval=2))
    assert again is not None and "\n" not in again
    assert again.endswith("in place of those that were there: shapes.num_eval was 1.")


def test_no_caption_fits_two_drawings_and_each_names_every_attribute() -> None:
    drawings = all_drawings()
    captions = [caption for drawing in drawings for caption in drawing.captions]
    assert len(set(captions)) == len(captions) == 5 * len(drawings)
    assert all(value in caption for drawing in drawings for caption in drawing.captions for value in astuple(drawing))


def test_every_two_drawings_differ_by_more_than_their_jitter() -> None:
    drawings = [d for d in all_drawings() if d.row == "middle" and d.column == "centre"]
    pixels = [np.asarray(draw(d, np.random.default_rng(0)), dtype=float) for d in drawings]
    differences = [np.abs(a - b).sum() for a, b in combinations(pixels, 2)]
    assert min(differences) > 1500


def test_training_and_held_out_drawings_share_nothing(made: Path) -> None:
    train = read_records(made / "records.jsonl", default_prompt="")
    held_out = read_records(made / "eval.jsonl", default_prompt="")
    assert (len(train), len(held_out)) == (30, 10)
    assert {r.id for r in train}.isdisjoint(r.id for r in held_out)
    assert {c for r in train for c in r.answers}.isdisjoint(c for r in held_out for c in r.answers)
    assert all(Image.open(made / path).format == "JPEG" for r in [*train, *held_out] for path in r.image_paths)


def test_the_best_a_blank_image_can_score_is_far_below_a_tenth() -> None:
    """Without the image one caption must serve all: at most one of the held-out drawings can be right."""
    held_out = [drawing.captions for drawing in all_drawings()[:144]]
    best = max(exact_match([caption] * 144, held_out) for captions in held_out for caption in captions)
    assert best <= 1 / 144


def test_making_is_repeatable_and_done_once(made: Path, tmp_path: Path) -> None:
    make_shapes(ShapesConfig(dir=tmp_path, num_train=30, num_eval=10))
    assert digest(tmp_path) == digest(made)
    stamp = (made / "model" / "model.safetensors").stat().st_mtime_ns
    make_shapes(ShapesConfig(dir=made, num_train=30, num_eval=10))
    assert (made / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_half_made_data_is_made_again(tmp_path: Path) -> None:
    settings = ShapesConfig(dir=tmp_path, num_train=3, num_eval=2)
    make_shapes(settings)
    whole = digest(tmp_path)
    marker = tmp_path / "made.json"
    marker.write_text(marker.read_text().replace("true", "false"))
    next((tmp_path / "images").iterdir()).unlink()
    make_shapes(settings)
    assert digest(tmp_path) == whole


def test_more_drawings_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="864 different drawings"):
        make_shapes(ShapesConfig(dir=tmp_path, num_train=860, num_eval=5))
