"""The probe: the logits that follow a fixed drawing and the adapter's prompt, taken when an adapter is made.

Whoever uses the adapter later takes them again. If they are the same, then base, adapter, processor, template, pixels and
libraries together still compute what they did; if they are the base's own, the adapter does nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape, PixelBudget, grid_of_resized, patches_of, resize_image
from vl_dist.data.records import ImagePart, Message
from vl_dist.errors import UserError
from vl_dist.evaluate.decode import left_padded
from vl_dist.run.distributed import evaluating

HEIGHT, WIDTH = 112, 168  # pixels of the drawing
FOUR_BITS = "4bit"
NUM_LIKELIEST, NUM_SPACED = 16, 32  # tokens kept: the likeliest of base and of adapter, and evenly spaced ones

# Largest difference of two logits, in the largest logit. float32 leaves room for the TF32 of a GPU's convolutions, bfloat16
# for its 8 bits, which add up over some dozen layers in another order on every device. A base that training had in 4 bits
# is whole in inference. How far off that is depends on the model: hashes show that it is the same one, and the probe that
# it computes no nonsense.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, FOUR_BITS: 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Logits of some tokens, from one forward pass with and one without the adapter."""

    dtype: str  # of the base's weights at that time: float32, bfloat16, or 4bit
    token_ids: tuple[int, ...]
    adapter: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """A probe taken now, and whether the adapter changed any logit of the vocabulary at all."""

    probe: Probe
    differs: bool


def drawing(number: int = 0) -> Image.Image:
    """The fixed RGB image; of several, each has its blocks elsewhere. Integers only, so that it is the same everywhere."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([rows * 2, columns, (rows * 3 + columns * 5) % 256], axis=-1).astype(np.uint8)
    for n, colour in enumerate([(220, 30, 40), (30, 160, 70), (40, 70, 210), (245, 210, 40)]):
        left = (12 + 40 * n + 56 * number) % (WIDTH - 28)
        pixels[14 + 20 * n : 44 + 20 * n, left : left + 28] = colour
    return Image.fromarray(pixels)


def probe_inputs(
    encoder: Encoder,
    image_processor: Any,
    prompt: Sequence[Message],
    budget: PixelBudget,
    shape: PatchShape,
    *,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """Inputs of the model: the prompt, with a drawing in each of its image places, under the budget.

    Raises:
        UserError: the template cannot be used.
    """
    num_images = sum(isinstance(part, ImagePart) for message in prompt for part in message.parts)
    images = [resize_image(drawing(n), budget, shape) for n in range(num_images)]
    encoded = encoder.encode_prompt(prompt, [grid_of_resized(image, shape) for image in images])
    pixels = [patches_of(images, shape, image_processor)] if images else []
    return left_padded([encoded], pixels, pad_id)


def take_probe(model: PeftModel, inputs: dict[str, torch.Tensor], token_ids: Sequence[int] | None = None) -> Taken:
    """Two forward passes, with the adapter and without it. The whole model must be on this rank.

    Args:
        inputs: of `probe_inputs`.
        token_ids: whose logits are kept; None: the likeliest ones of both, and evenly spaced ones.
    """
    with evaluating(model):
        adapter = next_logits(model.get_base_model(), inputs)
        with model.disable_adapter():
            base = next_logits(model.get_base_model(), inputs)
    chosen = list(token_ids) if token_ids is not None else _interesting(adapter, base)
    probe = Probe(
        dtype=_precision(model.get_base_model()),
        token_ids=tuple(chosen),
        adapter=tuple(adapter[chosen].tolist()),
        base=tuple(base[chosen].tolist()),
    )
    # The same operations on the same device: an adapter that adds nothing changes not one bit.
    return Taken(probe, not torch.equal(adapter, base))


def _precision(base: Any) -> str:
    """Of the weights that decide how far off logits may be. transformers marks a base that it made 4 bits wide."""
    return FOUR_BITS if getattr(base, "is_loaded_in_4bit", False) else str(base.lm_head.weight.dtype).removeprefix("torch.")


def next_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[vocabulary] float32 on the CPU: the scores of the answer's first token, as the first step of generation has them.

    Args:
        model: Qwen2-VL, with or without an adapter in its layers.
    """
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        output = model(**placed, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1].float().cpu()
    return logits


def distance(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest difference of two logits, in the largest expected one; infinite where one is no number."""
    a, b = np.array(found), np.array(expected)
    difference = float(np.abs(a - b).max() / max(1e-6, float(np.abs(b).max())))
    return difference if np.isfinite(difference) else float("inf")


def tolerance(*dtypes: str) -> float:
    """The largest distance that these precisions explain."""
    return max(TOLERANCE[dtype] for dtype in dtypes)


def compare(taken: Taken, expected: Probe) -> str:
    """What was found, in a few words, where all is as it should be.

    Raises:
        UserError: the base's logits are not the recorded ones, the adapter's are not, or the adapter changes nothing.
    """
    allowed = tolerance(taken.probe.dtype, expected.dtype)
    of_base = distance(taken.probe.base, expected.base)
    if of_base > allowed:
        raise UserError(
            f"The base model does not compute what it did in training: its probe logits are off by {of_base:.2g} of the "
            f"largest, {allowed:g} is allowed in {taken.probe.dtype}. Give the base model that the adapter was trained on, "
            "and install the libraries' versions of training_metadata.json."
        )
    if not taken.differs:
        raise UserError(
            "The adapter changes no logit of the base model: it would be the base in disguise. Its weights are zero, so "
            "nothing was trained, or this version of peft does not apply them."
        )
    of_adapter = distance(taken.probe.adapter, expected.adapter)
    if of_adapter > allowed:
        raise UserError(
            f"The adapter does not compute what it did when it was made: its probe logits are off by {of_adapter:.2g} of "
            f"the largest, {allowed:g} is allowed in {taken.probe.dtype}. Restore its files, or export it again."
        )
    against = f" against {expected.dtype}" if expected.dtype != taken.probe.dtype else ""
    return f"off by {of_adapter:.1g}, {allowed:g} allowed in {taken.probe.dtype}{against}; differs from the base"


def _interesting(adapter: torch.Tensor, base: torch.Tensor) -> list[int]:
    likeliest = [*adapter.topk(min(NUM_LIKELIEST, len(adapter))).indices, *base.topk(min(NUM_LIKELIEST, len(base))).indices]
    spaced = range(0, len(adapter), max(1, len(adapter) // NUM_SPACED))
    return sorted({*(int(n) for n in likeliest), *spaced})
