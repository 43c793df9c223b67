"""Checkpoints: whole or recognisably not, plain data only, and training goes on as if nothing had happened."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.examples import SEVEN, packed_model
from vl_dist.data.collate import Collator
from vl_dist.errors import UserError
from vl_dist.model.load import load_base
from vl_dist.model.lora import adapter_state, load_adapter, load_adapter_weights
from vl_dist.model.packed import PackedModel
from vl_dist.run import checkpoint
from vl_dist.run.checkpoint import (
    TrainState,
    damage,
    find_checkpoint,
    load_checkpoint,
    save_adapter,
    save_checkpoint,
    try_save,
)
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine, Trained
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


def test_the_adapter_is_as_peft_saves_it(tiny_model: Path, tmp_path: Path) -> None:
    model = packed_model(tiny_model).peft_model
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert model.peft_config["default"].inference_mode is False


class At:
    """Counts the calls that reach the file system and does something before one of them."""

    NAMES = frozenset(
        ("open", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync", "write", "serialize_file", "statvfs")
    )

    def __init__(self, moment: int | None, action: Callable[[], None]) -> None:
        self.count = 0
        self._moment = moment
        self._action = action

    def __enter__(self) -> "At":
        sys.setprofile(self._notice)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.setprofile(None)

    def _notice(self, _frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in self.NAMES:
            self.count += 1
            if self.count == self._moment:
                self._action()


def in_a_fork(action: Callable[[], int]) -> int:
    """The exit code of a copy of this process that runs the action, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def two_checkpoints(root: Path, model: PackedModel, engine: PlainEngine) -> Trained:
    for number in (1, 2):
        save(root, model, engine, at_step(number), keep=2)
    found = engine.trained()
    assert found is not None
    return found


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint_and_nothing_that_looks_like_one(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model, engine = trained(tiny_model, collator)
    weights = two_checkpoints(tmp_path / "before", model, engine)
    root = tmp_path / "root"

    def save_until(moment: int | None) -> int:
        with At(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)) as at:
            save_checkpoint(root, model, weights, at_step(3), keep=2)
        return at.count

    shutil.copytree(tmp_path / "before", root, symlinks=True)
    num_moments = save_until(None)
    assert num_moments > 25
    found_at = set()
    for moment in range(1, num_moments + 1):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "before", root, symlinks=True)
        assert in_a_fork(lambda moment=moment: save_until(moment)) == -signal.SIGKILL
        found, skipped = find_checkpoint(root)
        assert found is not None and skipped == []
        assert damage((root / "latest").resolve(strict=True)) is None
        found_at.add(found.name)
    assert found_at == {"step-000002", "step-000003"}
    save_checkpoint(root, model, weights, at_step(4), keep=2)
    assert {path.name for path in root.iterdir()} == {"step-000003", "step-000004", "latest"}


def test_a_disk_that_fails_at_any_moment_of_a_save_is_a_reason_and_costs_nothing_that_was_there(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model, engine = trained(tiny_model, collator)
    weights = two_checkpoints(tmp_path / "before", model, engine)
    root = tmp_path / "root"

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reasons = []
    moment, reached = 0, True
    while reached:
        moment += 1
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "before", root, symlinks=True)
        with At(moment, full) as at:
            reasons.append(try_save(root, model, weights, at_step(3), keep=2))
        reached = at.count >= moment
        found, skipped = find_checkpoint(root)
        assert found is not None and skipped == []
        assert reasons[-1] is not None or found.name == "step-000003"
        assert damage((root / "latest").resolve(strict=True)) is None
        assert not list(root.glob(".writing-*"))
    assert sum(reason is not None and "No space left" in reason for reason in reasons) > 25
    assert reasons[-1] is None


@pytest.mark.parametrize("slot", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_what_the_system_says_while_a_tensor_file_grows_is_a_reason_too(
    tiny_model: Path, collator: Collator, tmp_path: Path, slot: str
) -> None:
    """Not a raised error of ours, but the kernel's, through the library that writes."""
    model, engine = trained(tiny_model, collator)
    weights = two_checkpoints(tmp_path, model, engine)
    limit = (tmp_path / "step-000002" / slot).stat().st_size - 1

    def save_with_a_limit() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        reason = try_save(tmp_path, model, weights, at_step(3), keep=2)
        return 7 if reason is not None and "large" in reason else 0

    assert in_a_fork(save_with_a_limit) == 7
    assert find_checkpoint(tmp_path) == (tmp_path / "step-000002", [])
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000002", "latest"}


def test_room_is_asked_for_before_anything_is_written(
    tiny_model: Path, collator: Collator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = trained(tiny_model, collator)
    weights = two_checkpoints(tmp_path, model, engine)
    monkeypatch.setattr("vl_dist.run.checkpoint.save_adapter", lambda *_: pytest.fail("something was written"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    reason = try_save(tmp_path, model, weights, at_step(3), keep=2)
    assert reason is not None and "1,048,576 bytes are free" in reason
    assert find_checkpoint(tmp_path) == (tmp_path / "step-000002", [])


def test_old_checkpoints_go_and_the_pinned_ones_stay(tiny_model: Path, collator: Collator, tmp_path: Path) -> None:
    model, engine = trained(tiny_model, collator)
    for number in range(1, 6):
        save(tmp_path, model, engine, at_step(number), keep=2)
        if number == 1:
            (tmp_path / "best").symlink_to("step-000001")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001", "step-000004", "step-000005"]


def test_checkpoints_beyond_the_one_that_was_taken_up_go_first(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model, engine = trained(tiny_model, collator)
    for number in (4, 5, 2, 3):
        save(tmp_path, model, engine, at_step(number), keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("make", [lambda path: torch.save({"x": 1}, path), lambda path: path.write_bytes(pickle.dumps(1))])
@pytest.mark.parametrize(
    "slot",
    ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "adapter_model.bin"],
)
def test_a_pickle_in_any_slot_is_refused_even_if_the_manifest_vouches_for_it(
    tiny_model: Path, collator: Collator, tmp_path: Path, slot: str, make: Callable[[Path], None]
) -> None:
    model, engine = trained(tiny_model, collator)
    path = save(tmp_path, model, engine)
    make(path / slot)
    (path / "manifest.json").unlink()
    checkpoint._write_manifest(path)
    assert damage(path) == f"{slot} is a pickle, which can run code when it is read"
    with pytest.raises(UserError, match="is a pickle"):
        load_checkpoint(path, model)


def test_a_file_that_the_manifest_forgets_or_that_is_no_tensor_file_is_damage(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model, engine = trained(tiny_model, collator)
    path = save(tmp_path, model, engine)
    (path / "optimizer.safetensors").write_text("no tensors")
    (path / "manifest.json").unlink()
    checkpoint._write_manifest(path)
    assert "optimizer.safetensors is not what its name says" in str(damage(path))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) == "optimizer.safetensors is not in manifest.json"


def test_an_adapter_with_another_prefix_is_an_error_and_never_the_base_in_disguise(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model, engine = trained(tiny_model, collator)
    path = save(tmp_path, model, engine)
    weights = load_file(path / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.", "base_model."): tensor for name, tensor in weights.items()}
    save_file(renamed, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="other layers"):
        load_adapter_weights(model.peft_model, path)
    base = load_base(tiny_model, torch.float32, "sdpa")
    with pytest.raises(UserError, match=r"base_model\.model"):
        load_adapter(base, path)
