"""The base model from its files; `model.lora` puts the adapter on it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, BitsAndBytesConfig, GenerationConfig, Qwen2VLForConditionalGeneration

from vl_dist.data.images import PatchShape
from vl_dist.errors import UserError
from vl_dist.model.attention import Backend, register
from vl_dist.model.quiet import without_bars
from vl_dist.model.tower import PatchProjection

NOT_IN_4_BITS = ["model.visual", "lm_head"]  # a tower in 4 bits sees worse, and the head is the embedding


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


def refuse_quantize(device: torch.device) -> None:
    """Makes sure that a base in 4 bits can be had.

    Raises:
        UserError: not on this device, or bitsandbytes is not installed.
    """
    if device.type != "cuda":
        raise UserError(
            f"model.quantize is 4bit, which needs a CUDA device, but this run is on {device.type}. Set model.quantize=null."
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantize is 4bit, which needs bitsandbytes, but it is not installed: pip install bitsandbytes, or set "
            "model.quantize=null."
        )


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with its scales quantised too (Dettmers et al., 2023), computing in the precision of all other weights."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=NOT_IN_4_BITS,
    )


def load_base(
    directory: Path, dtype: torch.dtype, backend: Backend, *, four_bits_on: torch.device | None = None
) -> Qwen2VLForConditionalGeneration:
    """The frozen base model on the CPU.

    Args:
        four_bits_on: a device on which the language model's linear layers are made 4 bits wide as they are read; None: none
            are, as inference and everything on a CPU have it.

    Raises:
        UserError: the weights are missing or of another model.
    """
    quantized: dict[str, Any] = {}
    if four_bits_on is not None:
        quantized = {"quantization_config": four_bits(dtype), "device_map": {"": four_bits_on}}
    try:
        with without_bars():
            base, found = Qwen2VLForConditionalGeneration.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation={"text_config": "eager" if backend == "eager" else register(), "vision_config": "sdpa"},
                output_loading_info=True,
                **quantized,
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
