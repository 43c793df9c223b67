"""Seven ragged examples over real photographs, and models to run them through."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vl_dist.data.collate import Collator
from vl_dist.data.features import FeatureReader, write_shard
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.model.attention import Backend
from vl_dist.model.features import feature_space
from vl_dist.model.load import attach_lora, load_base
from vl_dist.model.packed import PackedModel
from vl_dist.settings import LoraSettings


def _user(*parts: str | ImagePart) -> Message:
    return Message("user", tuple(TextPart(p) if isinstance(p, str) else p for p in parts))


def _assistant(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


SEVEN = [
    Example("rocket", (_user(ImagePart("rocket.jpg"), "COCO Yes:"),), "Two rockets stand side by side."),
    Example("text", (_user("What is a wave?"),), "A wave."),
    Example("cat", (_user(ImagePart("cat.jpg"), "COCO Yes:"),), "A cat sits on a wooden table next to a cup of coffee."),
    Example("both", (_user(ImagePart("china.jpg"), ImagePart("flower.jpg"), "Describe both."),), "A table and a cup."),
    Example("turns", (_user(ImagePart("coffee.jpg"), "What?"), _assistant("Coffee."), _user("Where?")), "On a table."),
    Example("short", (_user(ImagePart("astronaut.jpg"), "COCO Yes:"),), "A man."),
    Example("long", (_user("Tell me about rockets. " * 6),), "Two rockets stand under a clear sky. " * 3),
]


def packed_model(
    directory: Path,
    backend: Backend = "sdpa",
    *,
    r: int = 4,
    dropout: float = 0.0,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> PackedModel:
    """A tiny model whose adapter is random on both sides, so that every gradient is other than zero."""
    base = load_base(directory, dtype, backend)
    settings = LoraSettings(r=r, alpha=8, dropout=dropout)
    model = PackedModel(attach_lora(base, settings, seed=seed), backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.lora_parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def cached_collator(collator: Collator, model: PackedModel, names: Sequence[str], root: Path) -> Collator:
    """The collator reading a cache that holds the features of these images of its first folder alone.

    Args:
        root: the cache; not opened yet in what is returned, so that it can be sent to other processes.
    """
    space = feature_space(model, collator.pictures.image_processor)
    directory = root / space.key
    directory.mkdir(parents=True)

    def reading() -> Collator:
        return collator.reading(FeatureReader(directory, width=space.width, dtype=space.dtype))

    kept: list[tuple[str, torch.Tensor]] = []
    for name in names:
        pack = reading().pack_images([(0, name, None)])
        with torch.no_grad():
            kept.append((pack.image_keys[0], model.image_features(pack)))
    write_shard(directory, kept)
    return reading()


def gradients(model: PackedModel) -> dict[str, torch.Tensor]:
    """A copy of every LoRA gradient; the model's are cleared."""
    found = {}
    for name, parameter in model.lora_parameters.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor within `tolerance` of the largest entry of the expected one."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = wanted.abs().max()
        assert scale > 0, f"{name} is all zero: nothing is compared"
        difference = (actual[name] - wanted).abs().max() / scale
        assert difference <= tolerance, f"{name}: off by {difference:.2e} of its largest entry"
