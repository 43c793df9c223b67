"""The base model from its files, and LoRA on top of it."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoProcessor, GenerationConfig, Qwen2VLForConditionalGeneration

from vl_dist.data.images import PatchShape
from vl_dist.errors import UserError
from vl_dist.model.attention import Backend, register
from vl_dist.model.quiet import without_bars
from vl_dist.model.tower import PatchProjection
from vl_dist.settings import LoraSettings


def resolve_dtype(
    setting: Literal["auto", "float32", "bfloat16"], device_type: str, *, bf16_supported: bool
) -> torch.dtype:
    """The precision of the base weights.

    Raises:
        UserError: bfloat16 on a CUDA device that does not have it.
    """
    wanted = setting if setting != "auto" else "bfloat16" if device_type == "cuda" else "float32"
    if wanted == "bfloat16" and device_type == "cuda" and not bf16_supported:
        raise UserError(
            "This GPU has no bfloat16 (compute capability 8.0 or newer has). Set model.dtype=float32: the base model "
            "then takes twice the memory, so lower batch.max_tokens_per_pack if it does not fit."
        )
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def load_processor(directory: Path) -> Any:
    """Tokenizer, image processor and chat template of a model directory.

    Raises:
        UserError: a file is missing, or these are not Qwen2-VL's.
    """
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The processor files in {directory} cannot be loaded: {error}") from None
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise UserError(f"{directory} has no image processor or no chat template; give a Qwen2-VL model directory.")
    return processor


def patch_shape(directory: Path, processor: Any) -> PatchShape:
    """How images are cut, after making sure that model and processor agree on it.

    Raises:
        UserError: they do not, so that image tokens and image features could never match in number.
    """
    settings = json.loads((directory / "config.json").read_text())
    vision = settings.get("vision_config")
    if settings.get("model_type") != "qwen2_vl" or vision is None:
        raise UserError(f"{directory} holds a {settings.get('model_type')!r} model; only qwen2_vl is supported.")
    images = processor.image_processor
    model_side = (
        vision.get("patch_size", 14),
        vision.get("spatial_merge_size", 2),
        vision.get("temporal_patch_size", 2),
    )
    processor_side = (images.patch_size, images.merge_size, images.temporal_patch_size)
    if model_side != processor_side:
        raise UserError(
            f"{directory}: config.json cuts images by (patch, merge, temporal) {model_side}, but the processor by "
            f"{processor_side}: image tokens and features cannot match. Take both files from the same model."
        )
    return PatchShape(patch_size=images.patch_size, merge_size=images.merge_size)


def load_base(directory: Path, dtype: torch.dtype, backend: Backend) -> Qwen2VLForConditionalGeneration:
    """The frozen base model on the CPU.

    Raises:
        UserError: the weights are missing or of another model.
    """
    try:
        with without_bars():
            base, found = Qwen2VLForConditionalGeneration.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation={"text_config": "eager" if backend == "eager" else register(), "vision_config": "sdpa"},
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The model in {directory} cannot be loaded: {error}") from None
    if found["missing_keys"]:
        # transformers would go on with random numbers in their place.
        missing = sorted(found["missing_keys"])
        raise UserError(f"The model in {directory} lacks {len(missing)} weights, first {missing[0]}. Fetch it again.")
    base.generation_config = GenerationConfig()  # captions are greedy; the model's own file may ask for sampling
    embedding = base.model.visual.patch_embed
    embedding.proj = PatchProjection.of(embedding.proj)
    base.requires_grad_(False)
    return base


def attach_lora(base: Qwen2VLForConditionalGeneration, lora: LoraSettings, *, seed: int) -> PeftModel:
    """The base with trainable LoRA layers, in float32 whatever the base has.

    Raises:
        UserError: a target matches no layer, or `lora.init_from` does not fit.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(lora.target_modules),
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        bias="none",
    )
    linears = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise UserError(
                f"lora.target_modules names {target!r}, which no linear layer of this model is called. There are: {names}."
            )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property by its old name
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, settings)
    assert isinstance(model, PeftModel)
    if lora.init_from is not None:
        load_adapter_weights(model, lora.init_from)
        _check_scale(lora)
    return model


def _check_scale(lora: LoraSettings) -> None:
    assert lora.init_from is not None
    path = lora.init_from / "adapter_config.json"
    try:
        alpha = float(json.loads(path.read_text())["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}).") from None
    if alpha != lora.alpha:
        raise UserError(
            f"The adapter in {lora.init_from} was trained with lora.alpha {alpha:g}, here it is {lora.alpha:g}: "
            f"the same weights would be another function. Set lora.alpha={alpha:g}."
        )


def load_adapter_weights(model: PeftModel, directory: Path) -> None:
    """Overwrites the adapter's weights with those of a PEFT directory; every key must be there and no other.

    Raises:
        UserError: no adapter there, or its keys or shapes are not this adapter's.
    """
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no {name}. Give a directory that PEFT saved.")
    try:
        weights = load_peft_weights(str(directory), device="cpu")
    except SafetensorError as error:
        raise UserError(f"The adapter in {directory} is damaged: {error}.") from None
    expected = adapter_state(model)
    strange = sorted(weights.keys() - expected.keys()) or sorted(expected.keys() - weights.keys())
    if strange:
        raise UserError(
            f"The adapter in {directory} has other layers than lora.target_modules asks for, first {strange[0]!r}."
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"The adapter in {directory} has {name} of shape {tuple(weights[name].shape)}, here it is "
                f"{tuple(tensor.shape)}. Set lora.r to the adapter's rank."
            )
    set_peft_model_state_dict(model, weights)


def load_adapter(base: Qwen2VLForConditionalGeneration, directory: Path) -> PeftModel:
    """The base with a saved adapter on it, as inference uses it.

    Raises:
        UserError: a weight of the adapter has no place, or a place has no weight: PEFT would answer with the base alone.
    """
    with warnings.catch_warnings():  # of what is checked below
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, str(directory))
    expected = adapter_state(model).keys()
    strange = sorted(load_peft_weights(str(directory), device="cpu").keys() ^ expected)
    if strange:
        raise UserError(
            f"The adapter in {directory} is not for this model: {len(strange)} of its weights and of the model's layers do "
            f"not meet, first {strange[0]!r}. Give the base model that it was trained on, or restore its files."
        )
    return model


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names PEFT gives them in its files."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
