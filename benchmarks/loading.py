"""What reading costs: the lengths index cold and warm, and images through the collator beside a bare loop."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.real_shape import qwen_tokenizer
from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.index import FOLDER, Indexer
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.settings import DataConfig, TrainFile
from vl_dist.tiny import make_processor

SHAPE = PatchShape(patch_size=14, merge_size=2)
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))  # COCO's usual ones
NUM_DISTINCT = 24
CAPTION = "A man in a red jacket is riding a wave on top of a surfboard, number {}."


def source_photographs() -> list[Image.Image]:
    """Four photographs that scikit-image ships."""
    from skimage import data

    return [Image.fromarray(pixels) for pixels in (data.astronaut(), data.coffee(), data.cat(), data.rocket())]


def photographs(directory: Path, count: int) -> list[str]:
    """Names of `count` JPEG files, cut out of photographs that scikit-image ships, at COCO's sizes."""
    sources = source_photographs()
    made = []
    for n in range(NUM_DISTINCT):
        source, size = sources[n % len(sources)], SIZES[n % len(SIZES)]
        path = directory / f"source-{n}.jpg"
        source.rotate(n).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        made.append(path.read_bytes())
    names = [f"{n:06d}.jpg" for n in range(count)]
    for n, name in enumerate(names):
        (directory / name).write_bytes(made[n % NUM_DISTINCT])
    return names


def index_times(*, num_images: int, captions: int) -> tuple[float, float, float]:
    """Seconds to open a cold and a warm lengths index of one record for each caption, and its megabytes.

    The real vocabulary and template; `datasets` is imported before, which takes a second once a process.
    """
    import datasets  # noqa: F401

    processor = make_processor(qwen_tokenizer())
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        names = photographs(home, num_images)
        lines = [_record(f"{name}-{k}", name, k) for name in names for k in range(captions)]
        path = home / "records.jsonl"
        path.write_text("".join(lines))
        settings = DataConfig(train=(TrainFile(path=path),), resized_height=280, resized_width=280)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            encoder = Encoder(processor, merge_size=SHAPE.merge_size, end_token="<|endoftext|>")
            file = Indexer(processor, encoder, SHAPE, settings).open(path)
            assert len(file.lengths) == len(lines)
            times.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in (home / FOLDER).rglob("*") if file.is_file())
        return times[0], times[1], size / 1e6


def _record(name: str, image: str, number: int) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "COCO Yes:"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": CAPTION.format(number)}]
    return json.dumps({"id": name, "messages": messages}) + "\n"


def images_per_s(*, num_images: int, rounds: int) -> tuple[float, float]:
    """Images a second of one core: a bare loop of decode, resize and processor; and the collator. Medians, in turns."""
    torch.set_num_threads(1)
    processor = make_processor(qwen_tokenizer())
    encoder = Encoder(processor, merge_size=SHAPE.merge_size, end_token="<|endoftext|>")
    found: dict[str, list[float]] = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        names = photographs(home, num_images)
        budget = PixelBudget(resized_height=280, resized_width=280)
        collator = Collator(encoder, processor.image_processor, roots=[home], budget=budget, shape=SHAPE)
        prompts = [(Message("user", (ImagePart(name), TextPart("COCO Yes:"))),) for name in names]
        examples = [
            Example(name, prompt, CAPTION.format(n)) for n, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        ]
        for _ in range(rounds):
            for way, run in (("bare", _bare), ("ours", _ours)):
                started = time.perf_counter()
                run(home, names, processor.image_processor, collator, examples)
                found[way].append(num_images / (time.perf_counter() - started))
    return statistics.median(found["bare"]), statistics.median(found["ours"])


def _bare(home: Path, names: list[str], image_processor: Any, collator: Collator, examples: list[Example]) -> None:
    for name in names:
        with Image.open(home / name) as image:
            pixels = image.convert("RGB").resize((280, 280), Image.Resampling.BICUBIC)
        image_processor(images=[pixels], do_resize=False, return_tensors="pt")


def _ours(home: Path, names: list[str], image_processor: Any, collator: Collator, examples: list[Example]) -> None:
    for start in range(0, len(examples), 8):
        collator.pack(examples[start : start + 8])
