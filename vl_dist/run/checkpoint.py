"""Checkpoints: the adapter and what the optimizer needs to go on, as safetensors and JSON.

A checkpoint is written to a temporary directory, closed with a manifest of sizes and hashes, and only then renamed; the
pointer `latest` moves last. Whatever a kill leaves behind is therefore either complete or recognisable as not.

Everything is stored by parameter name and in full, so it restores onto another number of ranks and another ZeRO stage. No
random state is stored: each step seeds its own (`distributed.seed_dropout`).
"""

import errno
import hashlib
import json
import os
import shutil
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vl_dist.errors import UserError
from vl_dist.file_modes import give_usual_mode
from vl_dist.model.load import load_adapter_weights
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import MOMENTS, Trained

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
ROOM_BESIDE_TENSORS = 4 * 2**20  # bytes: the JSON files and headers, with room to spare
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # and torch.save's archives of them


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where training stands."""

    step: int  # optimizer steps done
    num_steps: int  # optimizer steps of the whole run
    epoch: float  # passes over the training records done
    data: str  # fingerprint of the training examples
    skipped: int = 0  # of the steps, those that the optimizer did not take
    format: int = 1

    @property
    def updates(self) -> int:
        """Steps that the optimizer took."""
        return self.step - self.skipped


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint holds beside the adapter's weights, which are in the model already."""

    state: TrainState
    moments: dict[str, torch.Tensor]  # for `Engine.restore_moments`


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


def try_save(root: Path, model: PackedModel, trained: Trained, state: TrainState, *, keep: int | None) -> str | None:
    """As `save_checkpoint`, but a disk that is full or gone is a value: why there is no checkpoint. Main process only."""
    try:
        save_checkpoint(root, model, trained, state, keep=keep)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        _remove_unfinished(root)
        return str(error)
    return None


def save_checkpoint(root: Path, model: PackedModel, trained: Trained, state: TrainState, *, keep: int | None) -> Path:
    """Writes `root/step-NNNNNN`, moves `latest` to it and removes the oldest beyond `keep`. Main process only.

    Args:
        root: `output_dir/checkpoints`.
        trained: weights and moments, whole.
        keep: checkpoints kept; None keeps all.

    Raises:
        OSError, SafetensorError: the disk does not take it; what was there before is untouched.
    """
    final = root / f"step-{state.step:06d}"
    temporary = root / f".writing-{final.name}"
    _remove_unfinished(root)
    temporary.mkdir(parents=True)
    _refuse_full_disk(root, trained)
    save_adapter(model.peft_model, temporary, trained.weights)
    save_file(trained.moments, temporary / OPTIMIZER)
    give_usual_mode(temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=2))
    _write_manifest(temporary)
    shutil.rmtree(final, ignore_errors=True)  # there only if it was damaged: its step was trained again
    temporary.rename(final)
    _flush(root)
    point(root / "latest", final.name)
    _prune(root, keep, newest=final.name)
    return final


def save_adapter(model: PeftModel, directory: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """The two files that PEFT saves an adapter as, without the card that it renders each time.

    Args:
        directory: made if it is not there.
        weights: whole, by parameter name; None: the model's own are whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    give_usual_mode(directory / "adapter_model.safetensors")
    settings = copy(model.peft_config[model.active_adapter])
    settings.inference_mode = True
    settings.save_pretrained(str(directory))


def find_checkpoint(root: Path) -> tuple[Path | None, list[Skipped]]:
    """The newest complete checkpoint under `root`, and the newer ones that are damaged."""
    skipped: list[Skipped] = []
    for path in sorted(root.glob("step-*"), reverse=True):
        reason = damage(path)
        if reason is None:
            return path, skipped
        skipped.append(Skipped(path, reason))
    return None, skipped


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used: a file is missing or differs from the manifest; None if it is whole."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for needed in (*ADAPTER_FILES, OPTIMIZER, STATE):
        if needed not in files:
            return f"{needed} is not in {MANIFEST}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _hash(path) != expected["sha256"]:
            return f"{name} has another hash than when it was written"
    return _not_plain(checkpoint)


def load_checkpoint(checkpoint: Path, model: PackedModel) -> Restored:
    """Restores the adapter in place, and reads what the optimizer needs (each rank for itself).

    Raises:
        UserError: the checkpoint is damaged, or of an adapter of another shape.
    """
    reason = damage(checkpoint)
    if reason is not None:
        raise UserError(f"The checkpoint {checkpoint} cannot be used: {reason}. Set run.resume to another one, or to auto.")
    load_adapter_weights(model.peft_model, checkpoint)
    moments = load_file(checkpoint / OPTIMIZER)
    expected = {f"{name}.{moment}" for name in model.lora_parameters for moment in MOMENTS}
    strange = sorted(expected ^ moments.keys())
    if strange:
        raise UserError(f"The checkpoint {checkpoint} has other moments than this adapter, first {strange[0]!r}.")
    try:
        return Restored(TrainState(**json.loads((checkpoint / STATE).read_text())), moments)
    except TypeError as error:
        raise UserError(f"{checkpoint / STATE} is of another version of this program: {error}.") from None


def restore(checkpoint: Path, model: PackedModel, ranks: Ranks) -> Restored:
    """The checkpoint that rank 0 chose, into the model of every rank (all ranks).

    Raises:
        UserError: a rank cannot read it; all raise the same.
    """

    def read() -> Restored:
        try:
            return load_checkpoint(checkpoint, model)
        except UserError as error:
            if ranks.is_main:
                raise
            raise UserError(
                f"Rank {ranks.rank} cannot read the checkpoint {checkpoint} that rank 0 goes on from: {error} "
                "All ranks read it: run.output_dir must be on a disk that all machines share."
            ) from None

    return ranks.each(read)


def _not_plain(checkpoint: Path) -> str | None:
    """Which file could run code when it is read, or is not of the kind its name says; None if all are plain."""
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        with path.open("rb") as file:
            if file.read(4).startswith(PICKLE_STARTS):
                return f"{path.name} is a pickle, which can run code when it is read"
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except (SafetensorError, ValueError) as error:
            return f"{path.name} is not what its name says ({error})"
    return None


def _remove_unfinished(root: Path) -> None:
    """What a save left that was killed or found no room."""
    for path in root.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_full_disk(root: Path, trained: Trained) -> None:
    tensors = [*trained.weights.values(), *trained.moments.values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + ROOM_BESIDE_TENSORS
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {needed:,} are needed", str(root))


def _write_manifest(directory: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(directory.iterdir())
        if path.is_file()
    }
    for name in files:
        _flush(directory / name)
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2))
    _flush(manifest)
    _flush(directory)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, target: str) -> None:
    """Moves a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _prune(root: Path, keep: int | None, *, newest: str) -> None:
    """Removes all but the `keep` newest; those beyond the newest step are left from a run that was taken up before them."""
    if keep is None:
        return
    pinned = {(root / name).resolve() for name in ("latest", "best") if (root / name).is_symlink()}
    by_age = sorted(root.glob("step-*"), key=lambda path: (path.name <= newest, path.name))
    for path in by_age[:-keep]:
        if path.resolve() not in pinned:
            shutil.rmtree(path, ignore_errors=True)
