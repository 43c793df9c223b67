"""Training speed beside the tutorial's loop, one feature switched on after the other, on the same photographs and captions.

    python -m benchmarks.train --device cpu|cuda [--quick] [--out DIRECTORY]

The model has the proportions of Qwen2-VL-2B (a quarter as wide and as deep on a CPU: a 64th of the operations) and random
weights; images are 280x280 and have five captions each. First the gradients of all ways are compared; then the ways take
turns, round by round, and medians are shown. Loading is inside the time: the tutorial reads rows that it encoded before,
ours decodes and encodes images in the training process. Writes train.json and train.png.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.loading import CAPTION, SHAPE, photographs
from benchmarks.real_shape import config_2b
from benchmarks.tutorial import (
    StepLosses,
    TutorialSettings,
    encode,
    load_model,
    load_rows,
    padding_collator,
    training_arguments,
)
from train import train_step
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PixelBudget
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.model.attention import resolve_backend
from vl_dist.model.load import load_base, load_processor
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import save_adapter
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine
from vl_dist.settings import LoraSettings, OptimConfig
from vl_dist.tiny import TinySize, make_processor, make_tokenizer, tiny_config

CAPTIONS = 5  # of each image
WORDS = ("red", "small", "wooden", "old", "bright", "surfer", "kitten", "rocket", "cup", "table", "beach", "garden")
QUARTER = TinySize(
    hidden=384, layers=7, heads=6, key_value_heads=1, mlp=2240, tower_hidden=320, tower_layers=8, tower_heads=4,
    num_merges=400, weight_scale=0.02,
)  # fmt: skip
QUARTER_VOCABULARY = 9500  # the head then has the 2B's share of the operations
TOLERANCE = 1e-4  # relative difference of gradients in float32
ROUGH_TOLERANCE = 5e-2  # in bfloat16


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train on the same examples."""

    name: str
    train: Callable[[], None]  # all examples once
    gradient: Callable[[], dict[str, torch.Tensor]]  # of the mean loss over the first examples, without dropout


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of one way."""

    name: str
    captions_per_s: float  # median over rounds
    slowest: float
    fastest: float
    times_tutorial: float  # median over rounds of the ratio within a round
    gradient_difference: float


class Task:
    """Model, photographs and captions on disk, and both sides' models in memory."""

    def __init__(self, home: Path, device: str, num_images: int) -> None:
        self.home = home
        self.rank = 16 if device == "cpu" else 64
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        _make_model(home / "model", device)
        names = photographs(home, num_images)
        self.groups = [[_example(name, k) for k in range(CAPTIONS)] for name in names]
        self.examples = [example for group in self.groups for example in group]
        (home / "data_vl.json").write_text(json.dumps([_tutorial_row(home, example) for example in self.examples]))
        self.ranks = Ranks(Accelerator())
        lora = LoraSettings(r=self.rank)
        backend = resolve_backend("auto", device, self.dtype, branches=True)
        base = load_base(home / "model", self.dtype, backend)
        self.model = PackedModel(attach_lora(base, lora, seed=0), backend).to(self.ranks.device)
        with torch.no_grad():
            for parameter in self.model.lora_parameters.values():
                parameter.normal_(0.0, 0.02)
        save_adapter(self.model.peft_model, home / "start")
        processor = load_processor(home / "model")
        budget = PixelBudget(resized_height=280, resized_width=280)
        encoder = Encoder(processor, merge_size=SHAPE.merge_size, end_token="<|endoftext|>")
        self.collator = Collator(encoder, processor.image_processor, roots=[home], budget=budget, shape=SHAPE)
        self.engine = PlainEngine(self.model, self.ranks, OptimConfig())
        self.settings = TutorialSettings(
            model_dir=home / "model", data=home / "data_vl.json", output_dir=home / "out", dtype=self.dtype,
            num_held_out=0, lora_r=self.rank, start_from=home / "start", shuffle=False, num_epochs=1,
        )  # fmt: skip
        settings, rows = self.settings, load_rows(self.settings)
        self.rows = rows.map(
            lambda row: encode(row, settings, processor.tokenizer, processor),
            remove_columns=rows.column_names,
            new_fingerprint="encoded",  # else datasets looks through all that the function can reach
        )
        self.padded = padding_collator(processor.tokenizer)
        self.tutorial_model = load_model(self.settings)

    def tutorial(self, batch: int, accumulation: int) -> Way:
        """The tutorial's loop at a batch."""
        settings = replace(self.settings, micro_batch_size=batch, gradient_accumulation_steps=accumulation)

        def train() -> None:
            arguments = training_arguments(settings)
            arguments.set_save(strategy="no")
            arguments.disable_tqdm = True
            StepLosses(
                model=self.tutorial_model, args=arguments, train_dataset=self.rows, data_collator=self.padded, shuffle=False
            ).train()

        return Way(f"tutorial's loop, batch {batch} x {accumulation}", train, self._tutorial_gradient)

    def ours(self, name: str, steps: Callable[[], Iterator[list[Batch]]]) -> Way:
        """This project's step over packs."""
        run: Any = SimpleNamespace(ranks=self.ranks, engine=self.engine)

        def train() -> None:
            self.model.train()
            self.engine.set_lr(1e-4)
            for packs in steps():
                losses, _ = train_step(packs, run)
            losses.sum().item()  # until the device is done

        def gradient() -> dict[str, torch.Tensor]:
            self.model.eval()
            num_targets, found, left = 0, {}, 4 * CAPTIONS
            for packs in steps():
                for pack in packs:
                    if left > 0:
                        self.model(pack.to(self.ranks.device)).backward()
                        num_targets, left = num_targets + pack.num_targets, left - len(pack.example_ids)
            assert left == 0, "other examples than the tutorial's"
            for key, parameter in self.model.lora_parameters.items():
                assert parameter.grad is not None
                found[key] = parameter.grad / num_targets
                parameter.grad = None
            return found

        return Way(name, train, gradient)

    def packs_of(self, size: int, per_step: int) -> Callable[[], Iterator[list[Batch]]]:
        """Steps of some packs, each of some examples."""

        def steps() -> Iterator[list[Batch]]:
            for start in range(0, len(self.examples), size * per_step):
                chosen = self.examples[start : start + size * per_step]
                yield [self.collator.pack(chosen[n : n + size]) for n in range(0, len(chosen), size)]

        return steps

    def shared(self, images: int) -> Callable[[], Iterator[list[Batch]]]:
        """Steps of one pack of some images with all their captions."""
        return lambda: (
            [self.collator.pack_documents(self.groups[start : start + images])]
            for start in range(0, len(self.groups), images)
        )

    def _tutorial_gradient(self) -> dict[str, torch.Tensor]:
        self.tutorial_model.eval()
        features = self.padded([self.rows[n] for n in range(4 * CAPTIONS)])
        moved = {name: value.to(self.ranks.device) for name, value in features.items()}
        self.tutorial_model(**moved).loss.backward()
        found = {}
        for name, parameter in self.tutorial_model.named_parameters():
            if parameter.requires_grad:
                found[name] = parameter.grad.clone()
            parameter.grad = None
        return found


def _make_model(directory: Path, device: str) -> None:
    words = [*WORDS, "system\nYou are a helpful assistant.", "user\nCOCO Yes:", "assistant\n", CAPTION]
    tokenizer = make_tokenizer(words * 3, num_merges=QUARTER.num_merges)
    config = tiny_config(tokenizer, QUARTER)
    if device == "cpu":
        config.text_config.vocab_size = QUARTER_VOCABULARY
        config.vision_config.mlp_ratio = 4
    else:  # the 2B itself, but for the ids of the special tokens
        ids = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
        config = config_2b()
        for name, value in ids.items():
            setattr(config, name, value)
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    make_processor(tokenizer).save_pretrained(directory)


def _caption(number: int) -> str:
    return f"A {WORDS[number % 5]} {WORDS[5 + number % 7]} near {'the ' * (number % 3)}{WORDS[5 + (number + 3) % 7]}."


def _example(name: str, k: int) -> Example:
    prompt = (Message("user", (ImagePart(name), TextPart("COCO Yes:"))),)
    return Example(f"{name}#{k}", prompt, _caption(int(name[:6]) + 3 * k))


def _tutorial_row(home: Path, example: Example) -> dict[str, Any]:
    question = f"COCO Yes: <|vision_start|>{home / example.image_paths[0]}<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": example.answer}]
    return {"id": example.id, "conversations": turns}


def ways_of(task: Task) -> list[Way]:
    """The tutorial's loop as it is and at a larger batch, then ours with one feature more each time."""
    return [
        task.tutorial(2, 2),
        task.tutorial(10, 1),
        task.ours("tower under no_grad, logits on targets only; 2 x 2", task.packs_of(2, 2)),
        task.ours("and packing, an image encoded once; 20 a pack", task.packs_of(20, 1)),
        task.ours("and data.share_prefix; 20 a pack", task.shared(4)),
    ]


def differences(ways: Sequence[Way]) -> list[float]:
    """Of each way's gradient from the first one's, relative to the largest entry of each tensor; the worst tensor."""
    wanted = ways[0].gradient()
    found = []
    for way in ways:
        gradient = wanted if way.gradient == ways[0].gradient else way.gradient()  # a batch of the same loop
        assert gradient.keys() == wanted.keys(), way.name
        found.append(max(float((gradient[n] - t).abs().max() / t.abs().max()) for n, t in wanted.items()))
    return found


def measure(ways: Sequence[Way], num_captions: int, rounds: int, apart: Sequence[float]) -> list[Speed]:
    """All ways in turn, `rounds` times, after one round that does not count."""
    speeds: list[list[float]] = [[] for _ in ways]
    for n in range(rounds + 1):
        for way, found in zip(ways, speeds, strict=True):
            started = time.perf_counter()
            way.train()
            if n:
                found.append(num_captions / (time.perf_counter() - started))
    ratios = [statistics.median(own / base for own, base in zip(found, speeds[0], strict=True)) for found in speeds]
    return [
        Speed(way.name, statistics.median(found), min(found), max(found), ratio, difference)
        for way, found, ratio, difference in zip(ways, speeds, ratios, apart, strict=True)
    ]


def draw(speeds: Sequence[Speed], path: Path) -> None:
    """Bars of captions a second."""
    image = Image.new("RGB", (900, 40 + 50 * len(speeds)), "white")
    pen = ImageDraw.Draw(image)
    fastest = max(speed.captions_per_s for speed in speeds)
    for n, speed in enumerate(speeds):
        top = 20 + 50 * n
        pen.text((10, top), speed.name, fill="black")
        pen.rectangle((10, top + 16, 10 + 700 * speed.captions_per_s / fastest, top + 36), fill="steelblue")
        pen.text((730, top + 20), f"{speed.captions_per_s:.2f} captions/s, {speed.times_tutorial:.1f}x", fill="black")
    image.save(path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Training speed beside the tutorial's loop.")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true", help="one round over few images")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="gets train.json and train.png")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    num_images, rounds = (4, 1) if given.quick else (8, 5)
    with tempfile.TemporaryDirectory() as directory:
        task = Task(Path(directory).resolve(), given.device, num_images)
        ways = ways_of(task)
        apart = differences(ways)
        allowed = TOLERANCE if task.dtype == torch.float32 else ROUGH_TOLERANCE
        assert max(apart) <= allowed, f"gradients differ: {apart}"
        speeds = measure(ways, len(task.examples), rounds, apart)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "train.json").write_text(json.dumps([asdict(speed) for speed in speeds], indent=1))
    draw(speeds, given.out / "train.png")
    table = Table("way", "captions/s", "slowest to fastest", "times the tutorial's", "gradient off by", title=given.device)
    for speed in speeds:
        spread = f"{speed.slowest:.2f} to {speed.fastest:.2f}"
        figures = (f"{speed.captions_per_s:.2f}", spread, f"{speed.times_tutorial:.2f}", f"{speed.gradient_difference:.0e}")
        table.add_row(speed.name, *figures)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
