"""The product: `adapter/`, with all that inference must know to see what training saw."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from vl_dist.data.encode import template_hash
from vl_dist.data.records import Example, messages_to_json, usual_prompt
from vl_dist.data.validate import pixel_budget
from vl_dist.errors import UserError
from vl_dist.run.best import Final
from vl_dist.run.checkpoint import ADAPTER_FILES, save_adapter
from vl_dist.run.files import METADATA
from vl_dist.settings import Config

LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def export_adapter(
    model: PeftModel,
    weights: dict[str, torch.Tensor],
    processor: Any,
    config: Config,
    *,
    examples: Sequence[Example],
    final: Final,
) -> Path:
    """Writes `output_dir/adapter` whole or not at all. Main process only.

    Args:
        weights: of the adapter, whole, by parameter name.
        processor: its files go beside the weights, so that inference needs no other.
        examples: what was trained on; their usual prompt is the one `predict` asks.
        final: the step whose weights these are, and their scores.

    Raises:
        UserError: the disk does not take it.
    """
    directory = config.run.output_dir / "adapter"
    temporary = directory.with_name(".writing-adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if final.checkpoint is None:
            save_adapter(model, temporary, weights)
        else:
            for name in ADAPTER_FILES:
                shutil.copy(final.checkpoint / name, temporary / name)
        processor.save_pretrained(temporary)
        metadata = _metadata(processor, config, examples=examples, final=final)
        (temporary / METADATA).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        card = model_card(config, step=final.step, num_examples=len(examples), scores=final.scores)
        (temporary / "README.md").write_text(card)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"The adapter cannot be written to {directory}: {error}. Make room, then start again.") from None
    return directory


def _metadata(processor: Any, config: Config, *, examples: Sequence[Example], final: Final) -> dict[str, Any]:
    return {
        "format": 1,
        "base_model": {"path": config.model.path, "hub": config.model.hub, "revision": config.model.revision},
        "dtype": config.model.dtype,
        "prompt": messages_to_json(usual_prompt(examples)),
        "pixels": asdict(pixel_budget(config.data)),
        "end_token": config.data.end_token,
        "template_hash": template_hash(processor),
        "max_new_tokens": config.eval.max_new_tokens,
        "step": final.step,
        "scores": final.scores,
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def exported_scores(output_dir: Path) -> dict[str, float]:
    """The scores of a finished run's adapter, by their columns of metrics.jsonl."""
    scores: dict[str, float] = json.loads((output_dir / "adapter" / METADATA).read_text())["scores"]
    return scores


def model_card(config: Config, *, step: int, num_examples: int, scores: dict[str, float]) -> str:
    """What the adapter is, how it was made, and how to load it."""
    rows = "\n".join(f"| {name.removeprefix('eval/')} | {value:.4f} |" for name, value in scores.items())
    table = f"\n## Scores on held-out records\n| score | value |\n|---|---|\n{rows}\n" if rows else ""
    files = ", ".join(f"`{file.path.name}`" for file in config.data.train)
    return f"""---
library_name: peft
base_model: {json.dumps(config.model.path)}
pipeline_tag: image-text-to-text
tags: [lora, qwen2_vl]
---
# LoRA adapter for {config.model.path}

Trained for {step} steps of {config.batch.examples_per_step} examples, out of {num_examples} in {files}:
rank {config.lora.r}, alpha {config.lora.alpha:g}, learning rate {config.optim.lr:g} ({config.optim.schedule}).
{table}
## Use
`python -m vl_dist predict DIRECTORY IMAGE` captions with the prompt and pixel size of training, which
`{METADATA}` records. In code: `PeftModel.from_pretrained(base_model, DIRECTORY)`.
"""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
