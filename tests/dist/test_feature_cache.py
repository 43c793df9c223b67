"""The feature cache under several ranks: whole runs with it are the runs without it, however it was filled."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import read_rows
from tests.processes import run_ranks, train_main
from vl_dist.cli import main as vl_dist_main
from vl_dist.data import features
from vl_dist.data.features import FeatureReader

NUM_STEPS = 6  # two epochs of 40 examples about 8 drawings, in steps of 15, 15 and 10
NUM_IMAGES = 8


def words(home: Path, *more: str) -> list[str]:
    data = home / "data"
    return [
        f"shapes.dir={data}", "shapes.num_train=8", "shapes.num_eval=1", f"model.path={data}/model",
        f"data.train={data}/records.jsonl", "data.eval=null", "data.num_workers=0", "run.cpu_threads=1",
        "batch.examples_per_step=15", "batch.max_tokens_per_pack=100", "lora.r=4", "lora.alpha=8", "lora.dropout=0",
        f"lora.init_from={home / 'adapter'}", "optim.num_epochs=2", "optim.max_steps=null", "optim.lr=1e-3",
        "data.shuffle=false", "log.every_steps=1", "log.wandb=off", *more,
    ]  # fmt: skip


def go(home: Path, name: str, config_file: str, *more: str, action: Any = train_main, code: int = 0) -> str:
    """One start of two ranks; what they printed."""
    log = home / f"{name}.log"
    log.unlink(missing_ok=True)
    given = words(home, f"run.output_dir={home / name}", *more)
    codes = run_ranks(action, given, world_size=2, log=log, config_file=config_file)
    assert codes == [code, code], log.read_text()[-3000:]
    return log.read_text()


def fill_ahead(arguments: list[str]) -> int:
    """`python -m vl_dist cache` in this process."""
    return vl_dist_main(["cache", *arguments])


def cached(root: Path) -> dict[str, torch.Tensor]:
    """Every image's features."""
    [directory] = [path for path in root.iterdir() if path.is_dir()]
    reader = FeatureReader(directory, width=128, dtype=torch.float32)
    found = {key: reader.get(key) for key in reader.keys()}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def losses(home: Path, name: str) -> list[float]:
    return [row["train/loss"] for row in read_rows(home / name / "metrics.jsonl") if "train/loss" in row]


def assert_same_losses(found: list[float], wanted: list[float]) -> None:
    """The first steps to 1e-5; after some more, Adam has made what was rounded otherwise a little larger."""
    assert found[:3] == pytest.approx(wanted[:3], rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-4)


def patch_rates(home: Path, name: str) -> list[float]:
    return [row["perf/patches_per_s"] for row in read_rows(home / name / "metrics.jsonl") if "train/loss" in row]


@pytest.fixture(scope="module")
def plain(home: Path) -> list[float]:
    """The losses of a run without a cache."""
    go(home, "plain", "cpu.yaml")
    found = losses(home, "plain")
    assert len(found) == NUM_STEPS
    return found


@pytest.fixture(scope="module")
def ahead(home: Path) -> dict[str, torch.Tensor]:
    printed = go(home, "ahead", "cpu.yaml", f"model.feature_cache={home / 'c-ahead'}", action=fill_ahead)
    assert f"{NUM_IMAGES} images, {NUM_IMAGES} of them added" in printed
    return cached(home / "c-ahead")


def assert_same_features(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) == NUM_IMAGES
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key


def test_a_cache_that_an_interrupted_run_filled_is_the_one_filled_ahead_and_the_run_is_the_same(
    home: Path, plain: list[float], ahead: dict[str, torch.Tensor]
) -> None:
    """ZeRO-3, where a rank that calls the tower alone would wait for ever; stopped after its first and second step."""
    cache = f"model.feature_cache={home / 'c-lazy'}"
    for _ in range(2):
        go(home, "lazy", "zero3.yaml", cache, "run.max_time=0.001", code=85)
    assert 0 < len(cached(home / "c-lazy")) < NUM_IMAGES
    printed = go(home, "lazy", "zero3.yaml", cache)
    assert "some were compared with a live pass" in printed
    assert_same_features(cached(home / "c-lazy"), ahead)
    assert_same_losses(losses(home, "lazy"), plain)
    rates = patch_rates(home, "lazy")
    # Step 6 shows images that step 3, of the same start, encoded: they are on disk at the end only.
    assert rates[0] > 0 and rates[3:5] == [0.0, 0.0]


def test_with_a_cache_filled_ahead_no_step_needs_the_tower(
    home: Path, plain: list[float], ahead: dict[str, torch.Tensor]
) -> None:
    cache = f"model.feature_cache={home / 'c-ahead'}"
    go(home, "hits", "cpu.yaml", cache, "data.share_prefix=true", "data.num_workers=1")
    assert_same_losses(losses(home, "hits"), plain)
    assert patch_rates(home, "hits") == [0.0] * NUM_STEPS


def test_a_damaged_shard_is_named_and_its_images_are_encoded_again(home: Path, ahead: dict[str, torch.Tensor]) -> None:
    root = home / "c-damaged"
    go(home, "damaged", "cpu.yaml", f"model.feature_cache={root}", action=fill_ahead)
    shard = next(root.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-40])
    printed = go(home, "damaged", "cpu.yaml", f"model.feature_cache={root}", action=fill_ahead)
    assert f"damaged shards: 1, first {shard.name}" in printed
    assert not shard.exists()
    assert_same_features(cached(root), ahead)


def train_on_a_full_disk(arguments: list[str]) -> int:
    """train.py, where rank 0 and rank 1 can write checkpoints, but no shard."""

    def save_file(tensors: object, path: Path, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    features.save_file = save_file  # type: ignore[assignment]
    return train_main(arguments)


def test_a_full_disk_is_one_warning_and_training_goes_on_with_the_tower(home: Path, plain: list[float]) -> None:
    printed = go(home, "full", "cpu.yaml", f"model.feature_cache={home / 'c-full'}", action=train_on_a_full_disk)
    assert printed.count("takes no more images") == printed.count("No space left on device") == 1
    assert_same_losses(losses(home, "full"), plain)
    assert all(rate > 0 for rate in patch_rates(home, "full"))


def test_what_cannot_be_cached_is_said_before_training(home: Path) -> None:
    blocked = home / "blocked"
    blocked.write_text("a file")
    printed = go(home, "refused", "cpu.yaml", f"model.feature_cache={blocked}", code=2)
    assert printed.count("the folder cannot be made") == 1
    printed = go(home, "none", "cpu.yaml", action=fill_ahead, code=2)
    assert "model.feature_cache is null" in printed
    assert os.environ.get("RANK") is None
