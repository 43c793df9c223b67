"""Greedy captions: left-padded batches of prompts of similar length, with the KV cache."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoded
from vl_dist.data.records import Example
from vl_dist.errors import UserError


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of prompts in batches of neighbours in length, the longest first: what does not fit shows at once.

    The same for any number of ranks: a caption does not depend on how many there are.
    """
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(
    base: Any,
    collator: Collator,
    prompts: Sequence[Example],
    batches: Iterable[Sequence[int]],
    *,
    max_new_tokens: int,
    pad_id: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Answers batch by batch, as they come: (index of the prompt, new token ids without the end token).

    Args:
        base: Qwen2-VL with the adapter's layers in it, in evaluation mode.
        prompts: examples whose answers are not looked at.
        batches: which prompts are answered together; an empty one gives an empty list.
        max_new_tokens: longest answer.
        pad_id: what shorter prompts are padded with on the left.

    Raises:
        UserError: an image cannot be used.
    """
    for chosen in batches:
        made = [collator.prompt(prompts[n]) for n in chosen]
        stop_ids = collator.encoder.stop_ids
        answers = answer_batch(base, made, stop_ids=stop_ids, max_new_tokens=max_new_tokens, pad_id=pad_id) if made else []
        yield list(zip(chosen, answers, strict=True))


def answer_batch(
    base: Any,
    prompts: Sequence[tuple[Encoded, torch.Tensor]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad_id: int,
) -> list[list[int]]:
    """New token ids of one batch, in order, without the end token.

    Args:
        base: as for `generate`.
        prompts: each as `Collator.prompt` makes it.
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer.
        pad_id: what shorter prompts are padded with on the left.

    Raises:
        UserError: the device ran out of memory.
    """
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad_id
    )
    inputs = left_padded([encoded for encoded, _ in prompts], [pixels for _, pixels in prompts], pad_id)
    with torch.no_grad(), _out_of_memory_named(len(prompts)):
        output = base.generate(
            **{name: tensor.to(base.device) for name, tensor in inputs.items()}, generation_config=settings
        )
    return [_until_end(ids, stop_ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]


@contextlib.contextmanager
def _out_of_memory_named(num_prompts: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"The device ran out of memory captioning {num_prompts} images together: {first_line} Lower eval.batch_size "
            "(--batch-size of predict and evaluate)."
        ) from None


def left_padded(encoded: Sequence[Encoded], pixels: Sequence[torch.Tensor], pad_id: int) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: B prompts padded to the longest, T; P patches and I images of all, in order."""
    longest = max(item.num_tokens for item in encoded)

    def pad(rows: list[np.ndarray[Any, Any]], value: int) -> torch.Tensor:
        padded = [np.pad(row.astype(np.int64), (longest - len(row), 0), constant_values=value) for row in rows]
        return torch.from_numpy(np.stack(padded))

    inputs = {
        "input_ids": pad([item.input_ids for item in encoded], pad_id),
        "attention_mask": pad([np.ones(item.num_tokens) for item in encoded], 0),
        "mm_token_type_ids": pad([item.is_image for item in encoded], 0),
    }
    grids = [(grid.t, grid.h, grid.w) for item in encoded for grid in item.grids]
    if grids:
        inputs["pixel_values"] = torch.cat(list(pixels))
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def _until_end(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((n for n, token_id in enumerate(ids) if token_id in stop_ids), len(ids))
    return ids[:end]
