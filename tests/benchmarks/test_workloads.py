"""What the training benchmark trains on: lengths, kinds of examples, and that every way gets the same."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.loading import SHAPE
from benchmarks.task import Task, differences
from benchmarks.train import peers_of, ways_of
from benchmarks.trainers import Tutorial, encode_example
from benchmarks.workloads import END_TOKEN, LONGEST, SHORTEST, TEMPLATE_TEXTS, Workload, mixed, mixed_examples
from vl_dist.data.encode import Encoder
from vl_dist.data.lengths import HeaderReader, Lengths, measure
from vl_dist.tiny import make_processor, make_tokenizer


def lengths_of(home: Path, workload: Workload) -> Lengths:
    processor = make_processor(make_tokenizer([*workload.texts, *TEMPLATE_TEXTS] * 3, num_merges=400))
    encoder = Encoder(processor, merge_size=SHAPE.merge_size, end_token=END_TOKEN)
    return measure(workload.examples, encoder, HeaderReader(home, workload.budget, SHAPE))


@pytest.fixture(scope="module")
def quick_task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("mixed").resolve()
    return Task(home, mixed(home, quick=True, on_gpu=False), on_gpu=False)


def test_mixed_examples_reach_from_100_to_4096_tokens_with_no_two_thirds_alike(tmp_path: Path) -> None:
    lengths = lengths_of(tmp_path, mixed(tmp_path, quick=False, on_gpu=False))
    assert lengths.tokens.min() == SHORTEST and lengths.tokens.max() == LONGEST
    for low, high in ((100, 345), (345, 1190), (1190, 4097)):
        share = np.mean((lengths.tokens >= low) & (lengths.tokens < high))
        assert 0.25 <= share <= 0.45, f"{low} to {high}"
    assert np.mean(lengths.images == 0) >= 0.15 and np.mean(lengths.images == 1) >= 0.3
    assert np.mean(lengths.images > 1) >= 0.15
    patches = {int(p) for p, n in zip(lengths.patches, lengths.images, strict=True) if n == 1}
    assert len(patches) >= 3, "several resolutions"


def test_mixed_examples_are_the_same_each_time(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        folder.mkdir()
    assert mixed_examples(first, 6) == mixed_examples(again, 6)
    names = sorted(path.name for path in first.iterdir())
    assert names and all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert mixed_examples(again, 6, seed=1) != mixed_examples(first, 6)


def test_the_tutorials_rows_have_the_tokens_targets_and_pixels_of_our_packs(quick_task: Task) -> None:
    assert {len(example.image_paths) for example in quick_task.workload.examples} >= {0, 1, 2}
    for example in quick_task.workload.examples:
        row, pack = encode_example(example, quick_task), quick_task.collator.pack([example])
        assert torch.equal(row["input_ids"], pack.input_ids)
        assert torch.equal(row["labels"][row["labels"] >= 0], pack.target_ids)
        if pack.num_images:
            assert torch.equal(row["pixel_values"], pack.pixel_values)
            assert torch.equal(row["image_grid_thw"], pack.image_grids)
        else:
            assert "pixel_values" not in row


def test_every_way_trains_every_example_once_and_has_the_tutorials_gradient(quick_task: Task) -> None:
    wanted = sorted(example.id for example in quick_task.workload.examples)
    for steps in (quick_task.packs_of(2, 2), quick_task.planned(), quick_task.shared()):
        packs = [pack for step in steps() for pack in step]
        assert sorted(name for pack in packs for name in pack.example_ids) == wanted
        assert max(pack.num_tokens for pack in packs) <= quick_task.workload.pack_tokens
    shutil.rmtree(quick_task.home / "features", ignore_errors=True)
    ways = [Tutorial(quick_task).way(2, 2), *ways_of(quick_task)]
    assert len(ways) == 5
    assert max(differences(ways)[1:]) <= 1e-5


def test_a_peer_that_is_not_installed_is_named_and_not_passed_over_in_silence(quick_task: Task) -> None:
    with mock.patch("benchmarks.train.trl_installed", return_value=False):
        ways, missing = peers_of(quick_task)
    assert ways == [] and len(missing) == 1 and "benchmarks/requirements.txt" in missing[0]


def test_the_cache_holds_every_photograph(quick_task: Task) -> None:
    shutil.rmtree(quick_task.home / "features", ignore_errors=True)
    collator = quick_task.caching()
    packs = [pack for step in quick_task.planned(collator)() for pack in step]
    assert sum(pack.num_images for pack in packs) > 0 and all(pack.num_encoded_images == 0 for pack in packs)
