"""Checkpoints: the adapter and what the optimizer needs to go on, as safetensors and JSON.

A checkpoint is written to a temporary directory, closed with a manifest of sizes and hashes, and only then renamed; the
pointer `latest` moves last. Whatever a kill leaves behind is therefore either complete or recognisable as not.

Everything is stored by parameter name and in full, so it restores onto another number of ranks. No random state is stored:
each step seeds its own (`train.seed_step`).
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from vl_dist.errors import UserError
from vl_dist.model.load import load_adapter_weights
from vl_dist.model.packed import PackedModel

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where training stands."""

    step: int  # optimizer steps done
    num_steps: int  # optimizer steps of the whole run
    epoch: float  # passes over the training records done
    data: str  # fingerprint of the training examples
    format: int = 1


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


def save_checkpoint(
    root: Path, model: PackedModel, optimizer: torch.optim.Optimizer, state: TrainState, *, keep: int | None
) -> Path:
    """Writes `root/step-NNNNNN`, moves `latest` to it and removes the oldest beyond `keep`. Main process only.

    Args:
        root: `output_dir/checkpoints`.
        keep: checkpoints kept; None keeps all.
    """
    final = root / f"step-{state.step:06d}"
    temporary = root / f".writing-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_adapter(model.peft_model, temporary)
    save_file(_moments(model, optimizer), temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=2))
    _write_manifest(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    point(root / "latest", final.name)
    _prune(root, keep)
    return final


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter as PEFT saves it, without the card PEFT would put beside it."""
    # False: "auto" may ask a hub whether the vocabulary was resized; LoRA here never trains embeddings.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)


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
    return None


def load_checkpoint(checkpoint: Path, model: PackedModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restores adapter and optimizer in place (each rank for itself).

    Raises:
        UserError: the checkpoint is damaged, or of an adapter of another shape.
    """
    reason = damage(checkpoint)
    if reason is not None:
        raise UserError(f"The checkpoint {checkpoint} cannot be used: {reason}. Set run.resume to another one, or to auto.")
    state = TrainState(**json.loads((checkpoint / STATE).read_text()))
    load_adapter_weights(model.peft_model, checkpoint)
    if state.step == 0:
        return state
    moments = load_file(checkpoint / OPTIMIZER)
    for name, parameter in model.lora_parameters.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step), device=parameter.device),
            **{moment: moments[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS},
        }
    return state


def _moments(model: PackedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].detach().cpu().contiguous()
        for name, parameter in model.lora_parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


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


def _prune(root: Path, keep: int | None) -> None:
    if keep is None:
        return
    pinned = {(root / name).resolve() for name in ("latest", "best") if (root / name).is_symlink()}
    old = sorted(root.glob("step-*"))[:-keep]
    for path in old:
        if path.resolve() not in pinned:
            shutil.rmtree(path)
