"""A model with the adapter in its weights: a directory that transformers and vLLM load without PEFT.

One copy of the model is in memory: layers are merged one after the other, in place.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from vl_dist.adapter.base_files import num_weight_bytes, stored_dtype
from vl_dist.adapter.contract import read_contract
from vl_dist.adapter.load import LoadedAdapter, find_base, load, without_bars
from vl_dist.adapter.probe import distance, next_logits, tolerance
from vl_dist.errors import UserError
from vl_dist.file_modes import give_usual_mode

ROOM_BESIDE_WEIGHTS = 64 * 2**20  # bytes: a real tokenizer's files and the configuration, with room to spare


def merge(
    directory: Path,
    out: Path,
    *,
    base_dir: Path | None,
    shard_size: str,
    on_step: Callable[[str, str], None] = lambda step, found: None,
) -> str:
    """Writes the merged model, whole or not at all, in the precision that the base is stored in.

    Args:
        directory: the adapter.
        out: must not be there, or be empty.
        base_dir: the base model's directory; None: where it was in training.
        shard_size: largest weight file, as `save_pretrained` takes it: "4GB".
        on_step: as for `load.load`.

    Returns:
        What the merged model's probe logits are against the adapter's, in a few words.

    Raises:
        UserError: the adapter does not hold what its contract says, or `out` cannot be written.
    """
    contract = read_contract(directory)
    _refuse_occupied(out)
    base = find_base(contract, base_dir)
    dtype = stored_dtype(base)
    _refuse_full_disk(out, num_weight_bytes(base) + ROOM_BESIDE_WEIGHTS)
    adapter = load(directory, base_dir=base, device=torch.device("cpu"), dtype=dtype, on_step=on_step)
    inputs = adapter.probe_inputs()
    before = next_logits(adapter.model, inputs)
    merged = adapter.model.merge_and_unload()
    found = _refuse_other_logits(before, next_logits(merged, inputs), dtype)
    temporary = out.with_name(f".writing-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        merged.generation_config = generation_config(adapter)
        with without_bars():
            merged.save_pretrained(temporary, max_shard_size=shard_size)
        give_usual_mode(*temporary.glob("*.safetensors"))
        adapter.processor.save_pretrained(temporary)
        temporary.replace(out)
    except (OSError, ValueError, SafetensorError) as error:  # safetensors wraps what the system says
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"The merged model cannot be written to {out}: {error}. Give another OUT.") from None
    return found


def generation_config(adapter: LoadedAdapter) -> Any:
    """The base's own settings of generation, ending also where the adapter was trained to end."""
    path = adapter.base_dir / "generation_config.json"
    settings = GenerationConfig.from_pretrained(adapter.base_dir) if path.is_file() else GenerationConfig()
    own = settings.eos_token_id
    ends = own if isinstance(own, list) else [own] if own is not None else []
    settings.eos_token_id = list(dict.fromkeys([*ends, *adapter.encoder.stop_ids]))
    if settings.pad_token_id is None:
        settings.pad_token_id = adapter.pad_id
    return settings


def _refuse_other_logits(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> str:
    """How far merging moved the logits.

    Raises:
        UserError: further than rounding explains.
    """
    found, allowed = distance(after.tolist(), before.tolist()), tolerance(str(dtype).removeprefix("torch."))
    if found > allowed:
        raise UserError(
            f"The merged model does not compute what base and adapter do: its logits are off by {found:.2g} of the "
            f"largest, {allowed:g} is allowed. Serve the adapter beside its base instead."
        )
    return f"logits off by {found:.1g} of the largest, {allowed:g} allowed"


def _refuse_occupied(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is there already and no directory. Give another OUT.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files. Give a new or an empty directory.")


def _refuse_full_disk(out: Path, needed: int) -> None:
    nearest = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"The merged model needs {needed / 2**30:.1f} GiB in {nearest}, {free / 2**30:.1f} GiB are free. Make room, or "
            "give another OUT."
        )
