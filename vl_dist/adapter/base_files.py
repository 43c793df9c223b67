"""What the files of a base model are: enough to tell one model from another in milliseconds, without loading either."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vl_dist.errors import UserError

NUM_SAMPLED = 32  # tensors whose values are looked at
VALUES_PER_TENSOR = 1024
# What saving a model again changes without changing the model.
NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor of a model lies."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it


def fingerprint(directory: Path) -> str:
    """Hash of config.json, of every tensor's name and shape, and of the first values of some evenly spaced tensors.

    Copies of a model have the same one, however its files are cut. A model whose weights are not safetensors is known by
    its configuration and the sizes of its files.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        settings = json.loads((directory / "config.json").read_text())
        found = hashlib.sha256(json.dumps(_kept(settings), sort_keys=True).encode())
        places = tensor_places(directory)
        for place in places:
            found.update(f"{place.name} {place.shape}\n".encode())
        for place in places[:: max(1, len(places) // NUM_SAMPLED)]:
            found.update(_first_values(place))
        if not places:
            sizes = sorted((path.name, path.stat().st_size) for path in directory.glob("*.bin"))
            found.update(json.dumps(sizes).encode())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"The base model in {directory} cannot be read: {error}. Fetch it again.") from None
    return found.hexdigest()[:32]


def tensor_places(directory: Path) -> list[TensorPlace]:
    """All tensors of a model's safetensors files, by name; from headers alone.

    Raises:
        OSError, SafetensorError: a file cannot be read.
    """
    places = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                places.append(TensorPlace(name, file, tuple(part.get_shape()), part.get_dtype()))
    return sorted(places, key=lambda place: place.name)


def stored_dtype(directory: Path) -> torch.dtype:
    """The precision that most tensors are stored in: bfloat16 or, whatever else they are, float32."""
    names = [place.dtype for place in tensor_places(directory)]
    return torch.bfloat16 if names.count("BF16") * 2 > len(names) else torch.float32


def num_weight_bytes(directory: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern))


def _kept(settings: object) -> object:
    if not isinstance(settings, dict):
        return settings
    return {name: _kept(value) for name, value in settings.items() if name not in NOT_THE_MODEL}


def _first_values(place: TensorPlace) -> bytes:
    with safe_open(place.file, framework="pt") as opened:
        part = opened.get_slice(place.name)
        if not place.shape:
            values = opened.get_tensor(place.name)
        else:
            width = max(1, place.shape[0] and _size(place.shape) // place.shape[0])
            values = part[: max(1, VALUES_PER_TENSOR // width)]
    values = values.flatten()[:VALUES_PER_TENSOR].contiguous()
    return bytes(values.view(torch.uint8).numpy().tobytes())


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
