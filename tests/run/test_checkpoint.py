"""Checkpoints: whole or recognisably not, plain data only, and training goes on as if nothing had happened."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import SEVEN, packed_model
from vl_dist.data.collate import Collator
from vl_dist.errors import UserError
from vl_dist.model.load import adapter_state
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import TrainState, damage, find_checkpoint, load_checkpoint, save_checkpoint
from vl_dist.run.optim import make_optimizer
from vl_dist.settings import OptimConfig

STATE = TrainState(step=1, num_steps=9, epoch=0.5, data="d")


def trained(tiny_model: Path, collator: Collator, *, r: int = 4) -> tuple[PackedModel, torch.optim.Optimizer]:
    model = packed_model(tiny_model, r=r)
    optimizer = make_optimizer(model.lora_parameters.values(), OptimConfig(lr=1e-2))
    step(model, optimizer, collator)
    return model, optimizer


def step(model: PackedModel, optimizer: torch.optim.Optimizer, collator: Collator) -> None:
    model(collator.pack(SEVEN[:3])).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, optimizer = trained(tiny_model, collator)
    path = save_checkpoint(tmp_path, model, optimizer, STATE, keep=None)
    fresh = packed_model(tiny_model, seed=8)
    again = make_optimizer(fresh.lora_parameters.values(), OptimConfig(lr=1e-2))
    assert load_checkpoint(path, fresh, again) == STATE
    for _ in range(3):
        step(model, optimizer, collator)
        step(fresh, again, collator)
    expected = adapter_state(model.peft_model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state(fresh.peft_model).items())


def test_a_checkpoint_is_plain_data_and_small(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, optimizer = trained(tiny_model, collator, r=64)
    path = save_checkpoint(tmp_path, model, optimizer, STATE, keep=None)
    names = {file.name for file in path.iterdir()}
    expected = {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "manifest.json"}
    assert names == expected
    trainable = sum(p.numel() * p.element_size() for p in model.lora_parameters.values())
    assert sum(file.stat().st_size for file in path.iterdir()) < 3.2 * trainable
    assert (tmp_path / "latest").resolve() == path


def killed(*_arguments: object) -> None:
    raise KeyboardInterrupt


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink], ids=["flipped byte", "cut file", "missing file"])
def test_any_damaged_file_makes_the_one_before_the_newest(
    tiny_model: Path, collator: Collator, tmp_path: Path, harm: Any
) -> None:
    model, optimizer = trained(tiny_model, collator)
    whole = save_checkpoint(tmp_path, model, optimizer, STATE, keep=None)
    newer = save_checkpoint(tmp_path, model, optimizer, TrainState(step=2, num_steps=9, epoch=1, data="d"), keep=None)
    backup = shutil.copytree(newer, tmp_path / "backup")
    assert find_checkpoint(tmp_path) == (newer, [])
    for name in sorted(file.name for file in backup.iterdir()):
        harm(newer / name)
        found, skipped = find_checkpoint(tmp_path)
        assert found == whole
        assert [skip.path for skip in skipped] == [newer]
        assert name in skipped[0].reason or "manifest" in skipped[0].reason or "hash" in skipped[0].reason
        with pytest.raises(UserError, match="cannot be used"):
            load_checkpoint(newer, model, optimizer)
        shutil.copy(backup / name, newer / name)


def test_what_a_kill_leaves_behind_is_not_taken_for_a_checkpoint(
    tiny_model: Path, collator: Collator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(tiny_model, collator)
    whole = save_checkpoint(tmp_path, model, optimizer, STATE, keep=None)
    later = TrainState(step=2, num_steps=9, epoch=1, data="d")
    for point in ("save_adapter", "save_file", "_write_manifest", "point"):
        with monkeypatch.context() as patch:
            patch.setattr(f"vl_dist.run.checkpoint.{point}", killed)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(tmp_path, model, optimizer, later, keep=None)
        found, skipped = find_checkpoint(tmp_path)
        expected = tmp_path / "step-000002" if point == "point" else whole
        assert (found, skipped) == (expected, [])
    assert save_checkpoint(tmp_path, model, optimizer, later, keep=None).name == "step-000002"
    assert {p.name for p in tmp_path.iterdir()} == {"step-000001", "step-000002", "latest"}


def test_old_checkpoints_go_and_the_pinned_ones_stay(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, optimizer = trained(tiny_model, collator)
    for number in range(1, 6):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=number, num_steps=9, epoch=1, data="d"), keep=2)
        if number == 1:
            (tmp_path / "best").symlink_to("step-000001")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001", "step-000004", "step-000005"]


def test_a_pickle_in_place_of_a_tensor_file_is_refused(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, optimizer = trained(tiny_model, collator)
    path = save_checkpoint(tmp_path, model, optimizer, STATE, keep=None)
    torch.save({"x": 1}, path / "optimizer.safetensors")
    assert damage(path) is not None
    shutil.copytree(path, tmp_path / "step-000003")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) == "optimizer.safetensors is not in manifest.json"
