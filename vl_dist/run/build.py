"""From settings to the objects that the loop uses: data, then model, each checked before the next is paid for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vl_dist.config import held_out_count
from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData
from vl_dist.data.records import Record, examples_of, read_records, split_held_out
from vl_dist.model.attention import resolve_backend
from vl_dist.model.load import attach_lora, load_base, resolve_dtype
from vl_dist.model.packed import PackedModel
from vl_dist.settings import Config, DataConfig


@dataclass(frozen=True, slots=True)
class RunData:
    """Training and held-out examples with their sizes."""

    train: LoadedData
    held_out: LoadedData | None


def pixel_budget(data: DataConfig) -> PixelBudget:
    """The size of every image, from the settings."""
    return PixelBudget(
        resized_height=data.resized_height,
        resized_width=data.resized_width,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
    )


def load_data(config: Config, processor: Any, shape: PatchShape) -> RunData:
    """Reads and measures all records; no image is decoded.

    Raises:
        UserError: records, images or lengths that cannot be used.
    """
    data = config.data
    encoder = Encoder(processor, merge_size=shape.merge_size, end_token=data.end_token)
    records = read_records(data.train, default_prompt=data.prompt)
    train_root = held_out_root = data.image_root or data.train.parent
    held_out: list[Record] = []
    if data.eval is not None and data.eval.startswith("last:"):
        records, held_out = split_held_out(records, held_out_count(data.eval))
    elif data.eval is not None:
        held_out = read_records(Path(data.eval), default_prompt=data.prompt)
        held_out_root = data.image_root or Path(data.eval).parent

    def loaded(chosen: list[Record], root: Path) -> LoadedData:
        examples = examples_of(chosen)
        headers = HeaderReader(root, pixel_budget(data), shape)
        lengths = measure(examples, encoder, headers, max_tokens=config.batch.max_tokens_per_pack)
        collator = Collator(encoder, processor.image_processor, root=root, budget=pixel_budget(data), shape=shape)
        return LoadedData(examples, lengths, collator)

    return RunData(loaded(records, train_root), loaded(held_out, held_out_root) if held_out else None)


def load_model(config: Config, directory: Path, device: torch.device) -> PackedModel:
    """Base and adapter on their device, ready to be wrapped.

    Raises:
        UserError: weights, targets or precision that cannot be used.
    """
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = resolve_dtype(config.model.dtype, device.type, bf16_supported=bf16)
    backend = resolve_backend(config.model.attention)
    base = load_base(directory, dtype, backend)
    return PackedModel(attach_lora(base, config.lora, seed=config.run.seed), backend).to(device)
