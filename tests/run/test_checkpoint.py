"""Checkpoints: whole or recognisably not, plain data only, and training goes on as if nothing had happened."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.examples import SEVEN, packed_model
from vl_dist.data.collate import Collator
from vl_dist.errors import UserError
from vl_dist.model.load import adapter_state
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import TrainState, damage, find_checkpoint, load_checkpoint, save_checkpoint
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine
from vl_dist.settings import OptimConfig

STATE = TrainState(step=1, num_steps=9, epoch=0.5, data="d")


def one_process() -> Ranks:
    return Ranks(Accelerator(cpu=True))


def engine_of(model: PackedModel) -> PlainEngine:
    return PlainEngine(model, one_process(), OptimConfig(lr=1e-2))


def trained(tiny_model: Path, collator: Collator, *, r: int = 4) -> tuple[PackedModel, PlainEngine]:
    model = packed_model(tiny_model, r=r)
    engine = engine_of(model)
    step(engine, collator)
    return model, engine


def step(engine: PlainEngine, collator: Collator) -> None:
    engine.backward(engine(collator.pack(SEVEN[:3])))
    engine.clip_and_step()


def save(
    root: Path, model: PackedModel, engine: PlainEngine, state: TrainState = STATE, *, keep: int | None = None
) -> Path:
    found = engine.trained()
    assert found is not None
    return save_checkpoint(root, model, found, state, keep=keep)


def at_step(number: int) -> TrainState:
    return TrainState(step=number, num_steps=9, epoch=1, data="d")


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, engine = trained(tiny_model, collator)
    path = save(tmp_path, model, engine)
    fresh = packed_model(tiny_model, seed=8)
    restored = load_checkpoint(path, fresh)
    assert restored.state == STATE
    again = engine_of(fresh)
    again.restore_moments(restored.moments, restored.state.step)
    for _ in range(3):
        step(engine, collator)
        step(again, collator)
    expected = adapter_state(model.peft_model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state(fresh.peft_model).items())


def test_a_checkpoint_is_plain_data_and_small(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, engine = trained(tiny_model, collator, r=64)
    path = save(tmp_path, model, engine)
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
    model, engine = trained(tiny_model, collator)
    whole = save(tmp_path, model, engine)
    newer = save(tmp_path, model, engine, at_step(2))
    backup = shutil.copytree(newer, tmp_path / "backup")
    assert find_checkpoint(tmp_path) == (newer, [])
    for name in sorted(file.name for file in backup.iterdir()):
        harm(newer / name)
        found, skipped = find_checkpoint(tmp_path)
        assert found == whole
        assert [skip.path for skip in skipped] == [newer]
        assert name in skipped[0].reason or "manifest" in skipped[0].reason or "hash" in skipped[0].reason
        with pytest.raises(UserError, match="cannot be used"):
            load_checkpoint(newer, model)
        shutil.copy(backup / name, newer / name)


def test_what_a_kill_leaves_behind_is_not_taken_for_a_checkpoint(
    tiny_model: Path, collator: Collator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = trained(tiny_model, collator)
    whole = save(tmp_path, model, engine)
    later = at_step(2)
    for point in ("save_adapter", "save_file", "_write_manifest", "_point"):
        with monkeypatch.context() as patch:
            patch.setattr(f"vl_dist.run.checkpoint.{point}", killed)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, model, engine, later)
        found, skipped = find_checkpoint(tmp_path)
        expected = tmp_path / "step-000002" if point == "_point" else whole
        assert (found, skipped) == (expected, [])
    assert save(tmp_path, model, engine, later).name == "step-000002"
    assert {p.name for p in tmp_path.iterdir()} == {"step-000001", "step-000002", "latest"}


def test_old_checkpoints_go_and_the_pinned_ones_stay(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, engine = trained(tiny_model, collator)
    for number in range(1, 6):
        save(tmp_path, model, engine, at_step(number), keep=2)
        if number == 1:
            (tmp_path / "best").symlink_to("step-000001")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001", "step-000004", "step-000005"]


def test_a_pickle_in_place_of_a_tensor_file_is_refused(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, engine = trained(tiny_model, collator)
    path = save(tmp_path, model, engine)
    torch.save({"x": 1}, path / "optimizer.safetensors")
    assert damage(path) is not None
    shutil.copytree(path, tmp_path / "step-000003")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) == "optimizer.safetensors is not in manifest.json"
