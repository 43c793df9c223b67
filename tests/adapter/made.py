"""A random adapter on the tiny model, exported as a run exports it, without a run."""

from pathlib import Path

import torch

from tests.examples import packed_model
from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.model.load import load_processor
from vl_dist.model.packed import PackedModel
from vl_dist.run.best import Final
from vl_dist.run.export import export_adapter
from vl_dist.settings import Config, DataConfig, EvalConfig, LoraSettings, ModelConfig, RunConfig

PROMPT = "COCO Yes:"
MAX_PIXELS = 84 * 112
NAMES = ("rocket", "cat", "china", "flower", "coffee", "astronaut")


def asking(image: str, text: str = PROMPT) -> tuple[Message, ...]:
    return (Message("user", (ImagePart(image), TextPart(text))),)


def trained_on(tiny_model: Path, photos: Path) -> LoadedData:
    processor, shape = load_processor(tiny_model), PatchShape(patch_size=14, merge_size=2)
    encoder = Encoder(processor, merge_size=2, end_token="<|endoftext|>")
    budget = PixelBudget(max_pixels=MAX_PIXELS)
    examples = [Example(name, asking(f"{name}.jpg"), "A man.") for name in NAMES]
    collator = Collator(encoder, processor.image_processor, roots=[photos], budget=budget, shape=shape)
    return LoadedData(examples, measure(examples, encoder, HeaderReader(photos, budget, shape)), collator)


def export(
    tiny_model: Path, photos: Path, output_dir: Path, *, dtype: torch.dtype = torch.float32
) -> tuple[Path, PackedModel]:
    """`output_dir/adapter`, and the model that it is of."""
    model = packed_model(tiny_model, dtype=dtype)
    config = Config(
        model=ModelConfig(path=str(tiny_model), dtype="bfloat16" if dtype == torch.bfloat16 else "float32"),
        lora=LoraSettings(r=4, alpha=8, dropout=0.0),
        data=DataConfig(end_token="<|endoftext|>", max_pixels=MAX_PIXELS),
        eval=EvalConfig(max_new_tokens=6),
        run=RunConfig(output_dir=output_dir),
    )
    weights = {name: p.detach().clone() for name, p in model.lora_parameters.items()}
    final = Final(None, 7, {"eval/cider": 1.5})
    data = trained_on(tiny_model, photos)
    return export_adapter(model.peft_model, weights, load_processor(tiny_model), config, data=data, final=final), model
