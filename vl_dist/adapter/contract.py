"""What an adapter was trained with and inference must repeat: its contract, in `training_metadata.json`."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vl_dist.adapter.probe import Probe
from vl_dist.data.images import PixelBudget
from vl_dist.data.records import Message, messages_to_json, parse_messages
from vl_dist.errors import UserError
from vl_dist.run.files import METADATA
from vl_dist.settings import ModelConfig

FORMAT = 2
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
# What people write into their own copies: the card, and the base model's name in the configuration. The probe sees whether
# the configuration still means the same.
MAY_CHANGE = (METADATA, "README.md", "adapter_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterContract:
    """What an adapter was trained with and inference must repeat."""

    base_model: ModelConfig
    base_fingerprint: str  # of `base_files.fingerprint`
    prompt: tuple[Message, ...]  # image paths are placeholders
    prompt_share: float  # of the training examples that had this prompt; below 1, other prompts are nothing new to it
    budget: PixelBudget
    end_token: str | None
    template: str  # hash of the chat template
    max_new_tokens: int
    key_style: str  # what the names of the adapter's weights begin with
    files: dict[str, str]  # sha256 of each file, but of those in MAY_CHANGE
    probe: Probe

    @property
    def difference(self) -> str | None:
        """What inference has otherwise than training had, for whoever uses the adapter; None: nothing."""
        if self.base_model.quantize is None:
            return None
        return "training had the base in 4 bits, here it is whole: logits and captions differ a little from training's"

    def to_json(self) -> dict[str, Any]:
        """The object that `read_contract` reads; more may stand beside it."""
        base = self.base_model
        return {
            "format": FORMAT,
            "base_model": {"path": base.path, "hub": base.hub, "revision": base.revision},
            "base_fingerprint": self.base_fingerprint,
            "dtype": base.dtype,
            "quantize": base.quantize,
            "prompt": messages_to_json(self.prompt),
            "prompt_share": self.prompt_share,
            "pixels": asdict(self.budget),
            "end_token": self.end_token,
            "template_hash": self.template,
            "max_new_tokens": self.max_new_tokens,
            "key_style": self.key_style,
            "files": self.files,
            "probe": asdict(self.probe),
            "versions": {name: _version(name) for name in LIBRARIES},
        }


def read_contract(adapter: Path) -> AdapterContract:
    """The contract beside an adapter's weights.

    Raises:
        UserError: not an adapter directory of ours, or its metadata is damaged.
    """
    path = adapter / METADATA
    if not adapter.is_dir():
        raise UserError(f"There is no directory {adapter}. Give the adapter/ directory that a run of train.py left.")
    if not path.is_file():
        raise UserError(f"{adapter} has no {METADATA}. Give the adapter/ directory that a run of train.py left.")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise UserError(
                f"{path} is of format {found['format']}, this version reads format {FORMAT}. Remove {adapter} and start "
                "the finished run again: it makes the adapter anew without training."
            )
        return AdapterContract(
            # Adapters of before there was a choice had none.
            base_model=ModelConfig(**found["base_model"], dtype=found["dtype"], quantize=found.get("quantize")),
            base_fingerprint=found["base_fingerprint"],
            prompt=parse_messages(found["prompt"]),
            prompt_share=float(found["prompt_share"]),
            budget=PixelBudget(**found["pixels"]),
            end_token=found["end_token"],
            template=found["template_hash"],
            max_new_tokens=found["max_new_tokens"],
            key_style=found["key_style"],
            files=dict(found["files"]),
            probe=_parse_probe(found["probe"]),
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). Restore the adapter's own files.") from None


def _parse_probe(found: dict[str, Any]) -> Probe:
    ids, adapter, base = (tuple(found[name]) for name in ("token_ids", "adapter", "base"))
    return Probe(dtype=found["dtype"], token_ids=ids, adapter=adapter, base=base)


def hash_files(adapter: Path) -> dict[str, str]:
    """The sha256 of every file that must stay as it is."""
    found = {}
    for path in sorted(adapter.iterdir()):
        if path.is_file() and path.name not in MAY_CHANGE:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def refuse_changed_files(adapter: Path, contract: AdapterContract) -> None:
    """Makes sure that weights and processor files are those that were exported.

    Raises:
        UserError: one is missing or differs.
    """
    found = hash_files(adapter)
    for name, expected in contract.files.items():
        if found.get(name) != expected:
            what = "is missing" if name not in found else "is not the file that was exported"
            raise UserError(f"{adapter / name} {what}. Restore the adapter's own files, or export it again.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
