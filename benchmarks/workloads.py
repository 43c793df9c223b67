"""What the training benchmark trains on: photographs and texts made on the spot, the same for every way.

`coco`: 280x280 photographs with five short captions each, as in the tutorial. `mixed`: 100 to 4,096 tokens, text alone or
one to four photographs of several sizes, and answers from a few words to a page.

Mixed photographs are saved in multiples of 28 pixels, so that no way resizes them and all see the same pixels.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.loading import CAPTION, SHAPE, photographs, source_photographs
from benchmarks.real_shape import config_2b
from vl_dist.data.images import PixelBudget
from vl_dist.data.records import Example, ImagePart, Message, Part, TextPart
from vl_dist.tiny import TinySize, make_processor, make_tokenizer, tiny_config

CAPTIONS = 5  # of each COCO photograph
END_TOKEN = "<|endoftext|>"  # as in the tutorial
WORDS = ("red", "small", "wooden", "old", "bright", "surfer", "kitten", "rocket", "cup", "table", "beach", "garden")
TEMPLATE_TEXTS = ("system\nYou are a helpful assistant.", "user\nCOCO Yes:", "assistant\n")
SHORTEST, LONGEST = 100, 4096  # tokens of an example of the mixed workload
PIXELS = SHAPE.factor  # along each side of what becomes one language-model token
# Height and width in such units; the largest is below the 1,280 tokens at which Qwen2-VL's own processor shrinks.
SIZES = ((5, 6), (7, 10), (10, 10), (10, 14), (15, 20), (20, 27), (30, 36))
NUM_SHOWN = (0, 1, 2, 1, 1, 3, 0, 1, 2, 1, 4, 0)  # photographs of an example, in turns
FRAME = 20  # tokens of the chat template and of the answer's end
MARKS = 2  # tokens around an image
QUARTER = TinySize(
    hidden=384, layers=7, heads=6, key_value_heads=1, mlp=2240, tower_hidden=320, tower_layers=8, tower_heads=4,
    num_merges=400, weight_scale=0.02,
)  # fmt: skip
QUARTER_VOCABULARY = 9500  # the head then has the 2B's share of the operations
TINY = TinySize(hidden=64, layers=2, heads=4, key_value_heads=2, mlp=96, tower_hidden=32, tower_layers=2, num_merges=400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Examples, and how they are cut into steps and packs."""

    name: str
    groups: tuple[tuple[Example, ...], ...]  # examples that show one photograph and ask the same; else each alone
    budget: PixelBudget
    size: TinySize  # of the model on a CPU
    vocabulary: int  # of the model on a CPU
    model_note: str  # the model on a CPU, in words
    texts: tuple[str, ...]  # that the tokenizer is trained on, beside the template's
    rounds: int  # that count
    num_compared: int  # first examples that gradients are compared on
    pack_tokens: int  # most tokens of our packs
    examples_per_step: int  # of ours with packing
    tutorial_batches: tuple[int, ...]  # micro-batches among which the tutorial's best is looked for
    trl_max_length: int | None  # SFTTrainer's default cuts longer examples, images and all

    @property
    def examples(self) -> list[Example]:
        """All of them, in the order they are trained on."""
        return [example for group in self.groups for example in group]


def coco(home: Path, *, quick: bool, on_gpu: bool) -> Workload:
    """Photographs of COCO's sizes, seen as 280x280, with five captions each; files go to `home`."""
    names = photographs(home, 4 if quick else 128 if on_gpu else 8)
    return Workload(
        name="coco",
        groups=tuple(tuple(_captioned(name, n, k) for k in range(CAPTIONS)) for n, name in enumerate(names)),
        budget=PixelBudget(resized_height=280, resized_width=280),
        size=TINY if quick else QUARTER,
        vocabulary=QUARTER_VOCABULARY,
        model_note="tiny" if quick else "a quarter as wide and as deep",
        texts=(*WORDS, CAPTION),
        rounds=1 if quick else 5 if on_gpu else 3,
        num_compared=4 * CAPTIONS,
        pack_tokens=16384 if on_gpu else 4096,
        examples_per_step=160 if on_gpu else 20,
        tutorial_batches=(8, 16, 32, 64) if on_gpu else (4, 10, 20),
        trl_max_length=1024,
    )


def mixed(home: Path, *, quick: bool, on_gpu: bool) -> Workload:
    """Ragged examples by a fixed seed; photographs go to `home`."""
    count = 8 if quick else 128 if on_gpu else 16
    return Workload(
        name="mixed",
        groups=tuple((example,) for example in mixed_examples(home, count, longest=1024 if quick else LONGEST)),
        budget=PixelBudget(),
        size=TINY if quick else replace(QUARTER, layers=2, tower_layers=2),  # so that a whole run takes ten minutes
        vocabulary=QUARTER_VOCABULARY * 2 // 7,
        model_note="tiny" if quick else "a quarter as wide, two layers deep on each side",
        texts=(*WORDS, *(f" {word}" for word in WORDS)),  # every word one token
        rounds=1 if quick else 5 if on_gpu else 3,
        num_compared=8,
        pack_tokens=2 * LONGEST if on_gpu else LONGEST,
        examples_per_step=32 if on_gpu else 8,
        tutorial_batches=(1, 4, 8) if on_gpu else (1, 4),
        trl_max_length=None,
    )


WORKLOADS = {"coco": coco, "mixed": mixed}


def mixed_examples(home: Path, count: int, *, longest: int = LONGEST, seed: int = 0) -> list[Example]:
    """Examples whose lengths cover 100 to `longest` tokens evenly on a logarithmic scale, in random order.

    At least a quarter is text alone; up to a third has several photographs, as far as they fit.
    """
    rng = np.random.default_rng(seed)
    places = (np.arange(count) + rng.random(count)) / count
    lengths = SHORTEST * (longest / SHORTEST) ** places
    lengths[[0, -1]] = SHORTEST, longest  # both ends are there, however few examples
    shown = rng.permutation(np.resize(NUM_SHOWN, count)).tolist()
    examples = []
    for n, tokens in enumerate(rng.permutation(lengths).astype(int).tolist()):
        sizes = _sizes_within(shown[n], tokens - FRAME - 20, rng)
        names = sized_photographs(home, sizes, prefix=f"{n:03d}-")
        room = tokens - FRAME - sum(rows * columns + MARKS for rows, columns in sizes)
        answer = int(min(room - 5, math.exp(rng.uniform(math.log(12), math.log(400)))))
        parts: tuple[Part, ...] = (*map(ImagePart, names), TextPart(_text(room - answer, rng)))
        examples.append(Example(f"mixed-{n:03d}", (Message("user", parts),), _text(answer, rng)))
    return examples


def sized_photographs(home: Path, sizes: list[tuple[int, int]], *, prefix: str) -> list[str]:
    """Names of new JPEG files of these heights and widths in units of 28 pixels."""
    sources = source_photographs()
    names = []
    for n, (rows, columns) in enumerate(sizes):
        name = f"{prefix}{n:04d}.jpg"
        turned = sources[n % len(sources)].rotate(n)
        turned.resize((columns * PIXELS, rows * PIXELS), Image.Resampling.BICUBIC).save(home / name, quality=90)
        names.append(name)
    return names


def make_model(directory: Path, workload: Workload, *, on_gpu: bool) -> None:
    """Random weights in the workload's size, or the 2B's own on a GPU, and processor files."""
    tokenizer = make_tokenizer([*workload.texts, *TEMPLATE_TEXTS] * 3, num_merges=workload.size.num_merges)
    config = tiny_config(tokenizer, workload.size)
    if on_gpu:  # the 2B itself, but for the ids of the special tokens
        ids = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
        config = config_2b()
        for name, value in ids.items():
            setattr(config, name, value)
    else:
        config.text_config.vocab_size = workload.vocabulary
        config.vision_config.mlp_ratio = 4
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    make_processor(tokenizer).save_pretrained(directory)


def _captioned(name: str, number: int, k: int) -> Example:
    seed = number + 3 * k
    caption = f"A {WORDS[seed % 5]} {WORDS[5 + seed % 7]} near {'the ' * (seed % 3)}{WORDS[5 + (seed + 3) % 7]}."
    return Example(f"{name}#{k}", (Message("user", (ImagePart(name), TextPart("COCO Yes:"))),), caption)


def _sizes_within(wanted: int, room: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """At most so many photographs that fit into so many tokens together."""
    sizes: list[tuple[int, int]] = []
    for _ in range(wanted):
        fitting = [size for size in SIZES if size[0] * size[1] + MARKS <= room]
        if not fitting:
            break
        # The larger half of what fits: photographs should make up a good part of a long example.
        sizes.append(fitting[int(rng.integers(len(fitting) // 2, len(fitting)))])
        room -= sizes[-1][0] * sizes[-1][1] + MARKS
    return sizes


def _text(num_words: int, rng: np.random.Generator) -> str:
    """Words of one token each."""
    return " ".join(str(word) for word in rng.choice(WORDS, size=num_words))
