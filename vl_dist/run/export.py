"""The product: `adapter/`, with all that inference must know to see what training saw."""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError

from vl_dist.adapter.base_files import fingerprint
from vl_dist.adapter.contract import AdapterContract, hash_files
from vl_dist.adapter.probe import Probe, probe_inputs, take_probe
from vl_dist.config import plain
from vl_dist.data.collate import Collator
from vl_dist.data.encode import template_hash
from vl_dist.data.images import PatchShape, PixelBudget, area_bounds, target_size
from vl_dist.data.loader import LoadedData
from vl_dist.data.records import Message, prompt_share, usual_prompt
from vl_dist.errors import UserError
from vl_dist.model.lora import adapter_state, load_adapter_weights
from vl_dist.model.targets import describe_lora
from vl_dist.run.best import Final
from vl_dist.run.checkpoint import ADAPTER_FILES, save_adapter
from vl_dist.run.files import METADATA
from vl_dist.settings import Config, ModelConfig

ON_A_HUB = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME


def export_adapter(
    model: PeftModel,
    weights: dict[str, torch.Tensor],
    processor: Any,
    config: Config,
    *,
    data: LoadedData,
    final: Final,
) -> Path:
    """Writes `output_dir/adapter` whole or not at all. Main process only.

    The files are read back into the model for the probe, so that it is theirs whichever step they are of, and so that files
    which do not load are never left behind. Afterwards the model has its own weights again.

    Args:
        model: whole on this rank.
        weights: of the adapter, whole, by parameter name.
        processor: its files go beside the weights, so that inference needs no other.
        data: what was trained on; its examples' usual prompt is the one `predict` asks.
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
        with_budget(processor, data.collator.budget, data.collator.shape).save_pretrained(temporary)
        contract = _contract(model, temporary, processor, config, data)
        metadata = contract.to_json() | {"lora": _lora_choices(config), "step": final.step, "scores": final.scores}
        (temporary / METADATA).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        card = model_card(config, step=final.step, num_examples=len(data.examples), scores=final.scores)
        (temporary / "README.md").write_text(card)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"The adapter cannot be written to {directory}: {error}. Make room, then start again.") from None
    return directory


def with_budget(processor: Any, budget: PixelBudget, shape: PatchShape) -> Any:
    """A copy of the processor that bounds images as training did, for programs that know no more than its files.

    A fixed size has no place in them: there, an image that was resized to it before is left as it is.
    """
    low, high = area_bounds(budget, shape)
    if budget.resized_height is not None and budget.resized_width is not None:
        rows, columns = target_size(budget.resized_height, budget.resized_width, budget, shape)
        low = high = rows * columns
    copied = deepcopy(processor)
    copied.image_processor.size = type(copied.image_processor.size)(shortest_edge=low, longest_edge=high)
    return copied


def _contract(model: PeftModel, adapter: Path, processor: Any, config: Config, data: LoadedData) -> AdapterContract:
    """What inference must repeat, of an adapter whose files are written."""
    prompt = usual_prompt(data.examples)
    base_dir = Path(model.get_base_model().name_or_path)
    return AdapterContract(
        base_model=_base_model(config.model, base_dir),
        base_fingerprint=fingerprint(base_dir),
        prompt=prompt,
        prompt_share=prompt_share(data.examples, prompt),
        budget=data.collator.budget,
        end_token=config.data.end_token,
        template=template_hash(processor),
        max_new_tokens=config.eval.max_new_tokens,
        key_style=key_style(adapter_state(model)),
        files=hash_files(adapter),
        probe=_probe_of_files(model, adapter, processor, prompt, data.collator),
    )


def _base_model(model: ModelConfig, directory: Path) -> ModelConfig:
    """The base as it can be fetched again: where the hub's client names directories by revision, with that."""
    fetched = model.hub == "huggingface" and directory.parent.name == "snapshots"
    return replace(model, revision=directory.name) if fetched else model


def key_style(names: dict[str, torch.Tensor]) -> str:
    """What the names of the adapter's weights begin with, up to the layers: PEFT's prefix and the base's module names."""
    return ", ".join(sorted({re.split(r"\.(?:layers|blocks|merger)\.", name)[0] for name in names}))


def _probe_of_files(model: PeftModel, adapter: Path, processor: Any, prompt: tuple[Message, ...], made: Collator) -> Probe:
    pad_id = processor.tokenizer.pad_token_id
    inputs = probe_inputs(made.encoder, processor.image_processor, prompt, made.budget, made.shape, pad_id=pad_id)
    own = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    load_adapter_weights(model, adapter)
    taken = take_probe(model, inputs)
    set_peft_model_state_dict(model, own)
    return taken.probe


def exported_scores(output_dir: Path) -> dict[str, float]:
    """The scores of a finished run's adapter, by their columns of metrics.jsonl."""
    scores: dict[str, float] = json.loads((output_dir / "adapter" / METADATA).read_text())["scores"]
    return scores


def _lora_choices(config: Config) -> dict[str, Any]:
    """The settings of LoRA, for people and programs that look into the metadata."""
    chosen: dict[str, Any] = plain(replace(config.lora, init_from=None))
    del chosen["init_from"]
    return chosen | {"lr": config.optim.lr, "lr_tower": config.optim.lr_tower, "lr_merger": config.optim.lr_merger}


def _describe_rates(config: Config) -> str:
    optim = config.optim
    own = [f", {rate:g} in the {part}" for part, rate in (("tower", optim.lr_tower), ("merger", optim.lr_merger)) if rate]
    return f"learning rate {optim.lr:g}{''.join(own)} ({optim.schedule})"


def _describe_base(config: Config) -> str:
    return " The base was in 4 bits (NF4) in training." if config.model.quantize is not None else ""


def model_card(config: Config, *, step: int, num_examples: int, scores: dict[str, float]) -> str:
    """What the adapter is, how it was made, and how to load it."""
    rows = "\n".join(f"| {name.removeprefix('eval/')} | {value:.4f} |" for name, value in scores.items())
    table = f"\n## Scores on held-out records\n| score | value |\n|---|---|\n{rows}\n" if rows else ""
    files = ", ".join(f"`{file.path.name}`" for file in config.data.train)
    # The hubs take a name of theirs here and refuse a directory.
    base = f"base_model: {config.model.path}\n" if ON_A_HUB.fullmatch(config.model.path) else ""
    return f"""---
library_name: peft
{base}pipeline_tag: image-text-to-text
tags: [lora, qwen2_vl]
---
# LoRA adapter for {config.model.path}

Trained for {step} steps of {config.batch.examples_per_step} examples, out of {num_examples} in {files}:
{describe_lora(config.lora)}; {_describe_rates(config)}.{_describe_base(config)}
{table}
## Use
`python -m vl_dist predict DIRECTORY IMAGE` captions with the prompt and pixel size of training, which
`{METADATA}` records; `python -m vl_dist check DIRECTORY` says whether it computes what it did, and how vLLM
serves it. In code: `PeftModel.from_pretrained(base_model, DIRECTORY)`.
"""
