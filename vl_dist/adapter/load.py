"""An adapter ready for use, after everything its contract says was found to hold."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from vl_dist.adapter.base_files import fingerprint
from vl_dist.adapter.contract import AdapterContract, read_contract, refuse_changed_files
from vl_dist.adapter.probe import compare, probe_inputs, take_probe
from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder, template_hash
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.records import ImagePart, Message, TextPart, without_images
from vl_dist.errors import UserError
from vl_dist.model.hub import find_model
from vl_dist.model.load import load_base, load_processor, patch_shape, resolve_dtype
from vl_dist.model.lora import load_adapter

STEPS = ("contract", "files", "base model", "chat template", "weights", "probe")  # in this order


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """A base with an adapter on it that computes what it did when it was made."""

    directory: Path
    contract: AdapterContract
    base_dir: Path
    processor: Any
    encoder: Encoder
    shape: PatchShape
    model: PeftModel  # in evaluation mode

    def collator(self, roots: Sequence[Path], budget: PixelBudget | None = None) -> Collator:
        """What turns examples into tensors as training did.

        Args:
            roots: of each record file, what its image paths are relative to.
            budget: another than training's.
        """
        chosen = budget if budget is not None else self.contract.budget
        return Collator(self.encoder, self.processor.image_processor, roots=roots, budget=chosen, shape=self.shape)

    @property
    def pad_id(self) -> int:
        """What shorter prompts are padded with."""
        return int(self.processor.tokenizer.pad_token_id)

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """The fixed input of the probe."""
        contract = self.contract
        return probe_inputs(
            self.encoder,
            self.processor.image_processor,
            contract.prompt,
            contract.budget,
            self.shape,
            pad_id=self.pad_id,
        )


def load(
    directory: Path,
    *,
    base_dir: Path | None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    on_step: Callable[[str, str], None] = lambda step, found: None,
) -> LoadedAdapter:
    """The adapter with its base, checked from the cheapest step to the dearest.

    Args:
        directory: what a run left in `adapter/`.
        base_dir: the base model's directory; None: where it was in training.
        device: where it goes; None: a CUDA device if there is one.
        dtype: of the base's weights; None: as in training, or what this device has instead.
        on_step: called with each of STEPS that holds and what was found.

    Raises:
        UserError: one of them does not hold.
    """
    contract = read_contract(directory)
    on_step("contract", f"prompt {_shown(contract.prompt)!r}; {describe_budget(contract.budget)}")
    refuse_changed_files(directory, contract)
    on_step("files", f"{len(contract.files)} as they were exported")
    found_base = find_base(contract, base_dir)
    on_step("base model", "; ".join(filter(None, (str(found_base), contract.difference))))
    processor = load_processor(directory)
    if template_hash(processor) != contract.template:
        raise UserError(f"The chat template in {directory} is not the one of training; restore the adapter's own files.")
    shape = patch_shape(found_base, processor)
    encoder = Encoder(processor, merge_size=shape.merge_size, end_token=contract.end_token)
    on_step("chat template", contract.template)
    chosen = device if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_model(directory, found_base, dtype if dtype is not None else _dtype(contract, chosen)).to(chosen).eval()
    on_step("weights", _describe_weights(directory))
    loaded = LoadedAdapter(
        directory=directory,
        contract=contract,
        base_dir=found_base,
        processor=processor,
        encoder=encoder,
        shape=shape,
        model=model,
    )
    taken = take_probe(model, loaded.probe_inputs(), contract.probe.token_ids)
    on_step("probe", compare(taken, contract.probe))
    return loaded


def find_base(contract: AdapterContract, base_dir: Path | None) -> Path:
    """The directory of the adapter's base model, which must be the very model of training.

    Raises:
        UserError: it is not there, or is another one.
    """
    base = contract.base_model
    asked = base_dir if base_dir is not None else Path(base.path) if base.hub == "local" else None
    if asked is not None and not (asked / "config.json").is_file():
        raise UserError(f"There is no base model in {asked}. Give --base DIRECTORY: a copy of {base.path}.")
    found = asked if asked is not None else find_model(base)
    if fingerprint(found) != contract.base_fingerprint:
        raise UserError(
            f"The model in {found} is not the one that the adapter was trained on ({base.path}): its configuration or its "
            "weights are others. Give --base DIRECTORY of that model."
        )
    return found


def _dtype(contract: AdapterContract, device: torch.device) -> torch.dtype:
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return resolve_dtype(contract.base_model.dtype, device.type, bf16_supported=bf16)


def _load_model(directory: Path, base_dir: Path, dtype: torch.dtype) -> PeftModel:
    base = load_base(base_dir, dtype, "sdpa")
    try:
        model = load_adapter(base, directory)
        weights = load_peft_weights(str(directory), device="cpu")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = " ".join(str(error).split())[:400]
        raise UserError(
            f"The adapter in {directory} does not go onto {base_dir} ({type(error).__name__}: {first}). Restore its own "
            "files."
        ) from None
    broken = next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise UserError(f"The adapter's {broken} in {directory} holds values that are no numbers. Take another checkpoint.")
    return model


def _describe_weights(directory: Path) -> str:
    names = load_peft_weights(str(directory), device="cpu")
    settings = json.loads((directory / "adapter_config.json").read_text())
    return f"{len(names)} tensors, rank {settings['r']}, every key and shape in place"


def choose_budget(contract: AdapterContract, asked: PixelBudget, *, allow_other: bool) -> PixelBudget:
    """The pixel budget of inference: training's, unless another is asked for and allowed.

    Args:
        asked: without any value: none is asked for.

    Raises:
        UserError: another one without the flag, or one that makes no sense.
    """
    if asked in (PixelBudget(), contract.budget):
        return contract.budget
    if (asked.resized_height is None) != (asked.resized_width is None):
        raise UserError("--resized-height and --resized-width go together: give both or neither.")
    if any(value is not None and value < 1 for value in asdict(asked).values()):
        raise UserError("Sizes in pixels must be 1 or more.")
    if asked.min_pixels is not None and asked.max_pixels is not None and asked.min_pixels > asked.max_pixels:
        raise UserError(f"--min-pixels ({asked.min_pixels}) is above --max-pixels ({asked.max_pixels}).")
    if not allow_other:
        raise UserError(
            f"The adapter was trained with {describe_budget(contract.budget)}, asked for is {describe_budget(asked)}. "
            "Leave the option out, or give --allow-other-pixels to use sizes that it never saw."
        )
    return asked


def choose_prompt(contract: AdapterContract, text: str | None, *, allow_other: bool) -> tuple[Message, ...]:
    """The prompt of inference: training's, unless another text is asked for and allowed.

    Raises:
        UserError: another one without the flag.
    """
    if text is None:
        return contract.prompt
    last = contract.prompt[-1]
    images = tuple(part for part in last.parts if isinstance(part, ImagePart))
    prompt = (*contract.prompt[:-1], Message(last.role, (*images, TextPart(text))))
    refuse_other_prompt(contract, prompt, "--prompt", allow_other=allow_other)
    return prompt


def refuse_other_prompt(contract: AdapterContract, prompt: Sequence[Message], source: str, *, allow_other: bool) -> None:
    """Makes sure that inference asks what training asked; an adapter trained on several prompts may be asked any.

    Raises:
        UserError: it was trained on one prompt, and this is another.
    """
    known = contract.prompt_share < 1.0 or without_images(prompt) == without_images(contract.prompt)
    if not known and not allow_other:
        raise UserError(
            f"The adapter was trained on the prompt {_shown(contract.prompt)!r} alone; {source} asks {_shown(prompt)!r}. "
            "Ask the same, or give --allow-other-prompt."
        )


def describe_budget(budget: PixelBudget) -> str:
    """The pixel budget in words."""
    if budget.resized_height is not None:
        return f"images of {budget.resized_height}x{budget.resized_width} pixels (height x width)"
    bounds = [f"{name.replace('_', ' ')} {value:,}" for name, value in asdict(budget).items() if value is not None]
    return f"images of {' and '.join(bounds)}" if bounds else "images in their own size"


def _shown(prompt: Sequence[Message]) -> str:
    return " / ".join(message.text for message in prompt)[:80]
