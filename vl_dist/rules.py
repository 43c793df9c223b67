"""What no type says of a setting: the values that each may have, and how settings go together. No torch here."""

import math
from collections.abc import Callable
from typing import Any

from vl_dist.durations import duration_s
from vl_dist.errors import UserError
from vl_dist.lora_keys import check_lora
from vl_dist.recomputed import is_recompute
from vl_dist.settings import Config


def _above(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value is None or value > low), f"must be above {low}"


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value is None or value >= low), f"must be {low} or more"


# Paths of keys, and the rule that their value keeps.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shapes.seed": _at_least(0),
    "shapes.num_train": _at_least(1),
    "shapes.num_eval": _at_least(1),
    "model.recompute": (
        is_recompute,
        "must be none, all, or every_N with a whole number N of 2 or more (as every_2)",
    ),
    "lora.r": _at_least(1),
    "lora.alpha": _above(0),
    "lora.dropout": ((lambda value: 0 <= value < 1), "must be at least 0 and below 1"),
    "data.train": (
        (lambda value: len(value) > 0 and all(0 < file.weight < math.inf for file in value)),
        "must name at least one file, and weights must be above 0",
    ),
    "data.resized_height": _at_least(1),
    "data.resized_width": _at_least(1),
    "data.min_pixels": _at_least(1),
    "data.max_pixels": _at_least(1),
    "data.max_bad_fraction": ((lambda value: 0 <= value <= 1), "must be from 0 to 1"),
    "data.max_image_bytes": _at_least(1),
    "data.bucket_steps": _at_least(1),
    "data.num_workers": _at_least(0),
    "batch.examples_per_step": _at_least(1),
    "batch.max_tokens_per_pack": _at_least(1),
    "batch.pack_lengths": _at_least(1),
    "optim.lr": _above(0),
    "optim.lr_tower": _above(0),
    "optim.lr_merger": _above(0),
    "optim.warmup_steps": _at_least(0),
    "optim.weight_decay": _at_least(0),
    "optim.max_grad_norm": _above(0),
    "optim.num_epochs": _at_least(1),
    "optim.max_steps": _at_least(1),
    "checkpoint.every_steps": _at_least(1),
    "checkpoint.keep": _at_least(2),
    "eval.every_steps": _at_least(1),
    "eval.batch_size": _at_least(1),
    "eval.max_new_tokens": _at_least(1),
    "eval.num_shown": _at_least(0),
    "log.every_steps": _at_least(1),
    "log.peak_tflops": _above(0),
    "log.num_samples": _at_least(0),
    "run.seed": _at_least(0),
    "run.cpu_threads": _at_least(1),
    "run.stall_timeout": _above(0),
}


def check_rules_between(config: Config) -> None:
    """Raises `UserError` where settings, each right by itself, do not go together."""
    data = config.data
    if (data.resized_height is None) != (data.resized_width is None):
        raise UserError("data.resized_height and data.resized_width go together: give both or neither.")
    if data.resized_height is not None and (data.min_pixels is not None or data.max_pixels is not None):
        raise UserError(
            "data.resized_height/resized_width fix the size, data.min_pixels/max_pixels bound it: give one of the two."
        )
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise UserError(f"data.min_pixels ({data.min_pixels}) is above data.max_pixels ({data.max_pixels}).")
    if data.overflow == "shrink_images" and data.resized_height is not None:
        raise UserError(
            "data.overflow=shrink_images makes images smaller, but data.resized_height/resized_width fix their size."
        )
    check_lora(config)
    if config.model.feature_cache is not None and (config.lora.tower or config.lora.merger):
        raise UserError(
            "model.feature_cache keeps what the frozen tower makes of an image, but lora.tower or lora.merger trains it. "
            "Set model.feature_cache=null, or train the language model only."
        )
    if config.run.final == "best" and data.eval is None:
        raise UserError("run.final=best needs held-out records to tell which is best: set data.eval, or run.final=last.")
    if data.eval is not None and data.eval.startswith("last:"):
        held_out_count(data.eval)
    if config.run.max_time is not None:
        duration_s(config.run.max_time)


def held_out_count(spec: str) -> int:
    """N of `last:N`, the form of `data.eval` that holds out training records.

    Raises:
        UserError: what stands after `last:` is not a whole number above 0.
    """
    count = spec.removeprefix("last:")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"data.eval is {spec!r}; write last:N with a whole number N of 1 or more, or a file.")
    return int(count)
