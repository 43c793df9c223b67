"""Shards of features: whole or not there, read while others write, and never believed when altered."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vl_dist.data import features
from vl_dist.data.features import FeatureReader, feature_key, write_shard
from vl_dist.data.images import Grid

WIDTH = 8


def made(*keys: str, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    """Features of so many images, of 2, 3, … rows."""
    generator = torch.Generator().manual_seed(len(keys))
    return [(key, torch.randn(n + 2, WIDTH, generator=generator).to(dtype)) for n, key in enumerate(keys)]


def reader(directory: Path, dtype: torch.dtype = torch.float32) -> FeatureReader:
    return FeatureReader(directory, width=WIDTH, dtype=dtype)


def assert_same(found: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert found is not None
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = made("a", "b", "c", dtype=dtype)
    write_shard(tmp_path, wanted)
    cache = reader(tmp_path, dtype)
    for key, tensor in wanted:
        assert_same(cache.get(key), tensor)
    assert cache.get("d") is None
    assert cache.keys() == {"a", "b", "c"}


def test_a_shard_that_comes_while_reading_is_found_at_once(tmp_path: Path) -> None:
    cache = reader(tmp_path)
    assert cache.get("a") is None
    for key, tensor in made("a", "b", "c"):  # within one tick of the directory's time, too
        write_shard(tmp_path, [(key, tensor)])
        assert_same(cache.get(key), tensor)


def test_a_directory_that_does_not_change_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, made("a"))
    long_ago = time.time() - 60
    os.utime(tmp_path, (long_ago, long_ago))
    cache = reader(tmp_path)
    assert cache.get("b") is None
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("listed again"))
    assert cache.get("b") is None


@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
def test_a_file_that_is_cut_anywhere_costs_its_own_images_only(tmp_path: Path, place: float) -> None:
    cut = write_shard(tmp_path, made("a", "b"))
    write_shard(tmp_path, made("c"))
    content = cut.read_bytes()
    cut.write_bytes(content[: int(len(content) * place)])
    cache = reader(tmp_path)
    assert cache.keys() == {"c"}
    assert cache.damaged() == [cut]


def test_a_flipped_bit_costs_one_image_and_a_newer_shard_mends_it(tmp_path: Path) -> None:
    wanted = dict(made("a", "b"))
    shard = write_shard(tmp_path, list(wanted.items()))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    cache = reader(tmp_path)
    assert cache.get("b") is None
    assert_same(cache.get("a"), wanted["a"])
    write_shard(tmp_path, [("b", wanted["b"])])
    assert_same(cache.get("b"), wanted["b"])
    assert_same(reader(tmp_path).get("b"), wanted["b"])


@pytest.mark.parametrize(
    ("tensor", "metadata"),
    [
        (torch.zeros(4, WIDTH + 1), {"images": json.dumps({"a": [0, 4, 0]})}),
        (torch.zeros(4, WIDTH, dtype=torch.float16), {"images": json.dumps({"a": [0, 4, 0]})}),
        (torch.zeros(4, WIDTH), {"images": json.dumps({"a": [0, 5, 0]})}),
        (torch.zeros(4, WIDTH), {"images": json.dumps(["a"])}),
        (torch.zeros(4, WIDTH), {"other": "x"}),
        (torch.zeros(4, WIDTH), None),
    ],
)
def test_a_foreign_file_is_not_a_shard(tmp_path: Path, tensor: torch.Tensor, metadata: dict[str, str] | None) -> None:
    save_file({"features": tensor}, tmp_path / "x.safetensors", metadata=metadata)
    assert reader(tmp_path).keys() == frozenset()
    assert reader(tmp_path).damaged() == [tmp_path / "x.safetensors"]


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, made("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_as_readable_for_others_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    shard = write_shard(tmp_path, made("a"))
    assert shard.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_key_names_the_content_and_the_grid() -> None:
    keys = {feature_key(b"one", Grid(1, 4, 6)), feature_key(b"two", Grid(1, 4, 6)), feature_key(b"one", Grid(1, 6, 4))}
    assert len(keys) == 3
    assert feature_key(b"one", Grid(1, 4, 6)) in keys


def test_a_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    [(key, wanted)] = made("a")
    write_shard(tmp_path, [(key, wanted)])
    used = reader(tmp_path)
    assert_same(used.get(key), wanted)
    assert_same(pickle.loads(pickle.dumps(used)).get(key), wanted)
