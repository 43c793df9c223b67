"""Captions for images with a saved adapter, under the prompt, template and pixel budget of its training."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder, template_hash
from vl_dist.data.images import PixelBudget
from vl_dist.data.records import Example, Message, parse_messages, with_images
from vl_dist.errors import UserError
from vl_dist.evaluate.decode import generate
from vl_dist.model.hub import find_model
from vl_dist.model.load import load_adapter, load_base, load_processor, patch_shape, resolve_dtype
from vl_dist.run.files import METADATA
from vl_dist.settings import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterContract:
    """What an adapter was trained with and inference must repeat; read from `training_metadata.json`."""

    base_model: ModelConfig
    prompt: tuple[Message, ...]  # image paths are placeholders
    budget: PixelBudget
    end_token: str | None
    template: str  # hash of the chat template
    max_new_tokens: int


def read_contract(adapter: Path) -> AdapterContract:
    """The contract beside an adapter's weights.

    Raises:
        UserError: not an adapter directory of ours, or its metadata is damaged.
    """
    path = adapter / METADATA
    if not path.is_file():
        raise UserError(f"{adapter} has no {METADATA}. Give the adapter/ directory that a run of train.py left.")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return AdapterContract(
            base_model=ModelConfig(**found["base_model"], dtype=found["dtype"]),
            prompt=parse_messages(found["prompt"]),
            budget=PixelBudget(**found["pixels"]),
            end_token=found["end_token"],
            template=found["template_hash"],
            max_new_tokens=found["max_new_tokens"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}).") from None


def predict(adapter: Path, images: Sequence[Path], *, base_dir: Path | None, batch_size: int) -> Iterator[tuple[Path, str]]:
    """A caption for each image, in order, batch by batch.

    Args:
        base_dir: the base model's directory; None: where it was in training.
        batch_size: images captioned together.

    Raises:
        UserError: the adapter, its base or an image cannot be used.
    """
    contract = read_contract(adapter)
    missing = next((path for path in images if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"There is no image {missing}.")
    model_dir = base_dir if base_dir is not None else find_model(contract.base_model)
    processor = load_processor(adapter)
    if template_hash(processor) != contract.template:
        raise UserError(f"The chat template in {adapter} is not the one of training; restore the adapter's own files.")
    shape = patch_shape(model_dir, processor)
    encoder = Encoder(processor, merge_size=shape.merge_size, end_token=contract.end_token)
    collator = Collator(encoder, processor.image_processor, roots=[Path("/")], budget=contract.budget, shape=shape)
    model = _load(adapter, model_dir, contract)
    batches = generate(
        model.get_base_model(),
        collator,
        [_prompt(contract, path) for path in images],
        batch_size=batch_size,
        max_new_tokens=contract.max_new_tokens,
        pad_id=processor.tokenizer.pad_token_id,
    )
    for batch in batches:
        for n, ids in batch:
            yield images[n], processor.tokenizer.decode(ids, skip_special_tokens=True)


def _prompt(contract: AdapterContract, image: Path) -> Example:
    return Example(str(image), with_images(contract.prompt, [str(image.resolve())]), answer="")


def _load(adapter: Path, model_dir: Path, contract: AdapterContract) -> PeftModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = resolve_dtype(contract.base_model.dtype, device.type, bf16_supported=bf16)
    base = load_base(model_dir, dtype, "sdpa")
    return load_adapter(base, adapter).to(device).eval()
