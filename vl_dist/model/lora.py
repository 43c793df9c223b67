"""LoRA on a base model: which layers, which first weights, and what may be loaded into them."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import Qwen2VLForConditionalGeneration

from vl_dist.errors import UserError
from vl_dist.model.lora_linear import fuse_lora
from vl_dist.model.targets import choose_targets
from vl_dist.settings import LoraSettings


def attach_lora(base: Qwen2VLForConditionalGeneration, lora: LoraSettings, *, seed: int) -> PeftModel:
    """The base with trainable LoRA layers, in float32 whatever the base has.

    Raises:
        UserError: a target matches no layer, or `lora.init_from` does not fit.
    """
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=_for_peft(base, lora),
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        lora_dropout=lora.dropout,
        init_lora_weights="gaussian" if lora.init_lora_weights == "gaussian" else True,
        bias="none",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property by its old name
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, settings)
    assert isinstance(model, PeftModel)
    if lora.init_lora_weights == "orthogonal":
        _make_orthogonal(model)
    fuse_lora(model)
    if lora.init_from is not None:
        _refuse_other_kind(lora, lora.init_from)
        load_adapter_weights(model, lora.init_from)
        _refuse_other_scale(lora, lora.init_from)
    return model


def _for_peft(base: Qwen2VLForConditionalGeneration, lora: LoraSettings) -> list[str] | str:
    """The targets in the user's own words where PEFT takes them to mean the same layers; else the layers one by one."""
    modules = dict(base.named_modules())
    chosen = choose_targets(lora, [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]).names
    words = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    # PEFT would also reach parts that are not asked for, the patch embedding, and blocks that are no layers.
    theirs = [name for name in modules if check_target_module_exists(LoraConfig(target_modules=words), name)]
    return words if set(theirs) == set(chosen) else chosen


def _make_orthogonal(model: PeftModel) -> None:
    """PEFT's orthogonal start, A and B random with B A = 0, in float32: PEFT's own rounds them to the base's precision.

    Source: `LoraLayer.orthogonal_init` (peft 0.21), https://datta0.github.io/posts/rethink-lora-init/.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rank = a.shape[0]
            basis, _ = torch.linalg.qr(torch.randn(rank, rank))
            with torch.no_grad():
                a.copy_(basis[0::2].T @ torch.randn(rank // 2, a.shape[1]) / 10)
                b.copy_(torch.randn(b.shape[0], rank // 2) @ basis[1::2] / 10)


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["lora_alpha"], found["r"] = float(found["lora_alpha"]), int(found["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}).") from None
    return found


def _refuse_other_kind(lora: LoraSettings, directory: Path) -> None:
    """DoRA's weights are more than LoRA's, and mean another function."""
    _refuse_absent(directory)
    found = _read_settings(directory)
    if bool(found.get("use_dora")) != lora.dora:
        is_dora = "is DoRA" if found.get("use_dora") else "is not DoRA"
        raise UserError(f"The adapter in {directory} {is_dora}. Set lora.dora={str(not lora.dora).lower()}.")
    if found.get("alpha_pattern"):
        raise UserError(
            f"The adapter in {directory} has layers that are scaled by themselves (alpha_pattern), which is not supported."
        )


def _refuse_other_scale(lora: LoraSettings, directory: Path) -> None:
    found = _read_settings(directory)
    alpha, rslora = found["lora_alpha"], bool(found.get("use_rslora"))
    if (alpha, rslora) != (lora.alpha, lora.rslora):
        word = str(rslora).lower()
        raise UserError(
            f"The adapter in {directory} was trained with lora.alpha {alpha:g} and lora.rslora {word}, here they are "
            f"{lora.alpha:g} and {str(lora.rslora).lower()}: the same weights would be another function. Set "
            f"lora.alpha={alpha:g} lora.rslora={word}."
        )


def _refuse_absent(directory: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no {name}. Give a directory that PEFT saved.")


def load_adapter_weights(model: PeftModel, directory: Path) -> None:
    """Overwrites the adapter's weights with those of a PEFT directory; every key must be there and no other.

    Raises:
        UserError: no adapter there, or its keys or shapes are not this adapter's.
    """
    _refuse_absent(directory)
    try:
        weights = load_peft_weights(str(directory), device="cpu")
    except SafetensorError as error:
        raise UserError(f"The adapter in {directory} is damaged: {error}.") from None
    expected = adapter_state(model)
    strange = sorted(weights.keys() - expected.keys()) or sorted(expected.keys() - weights.keys())
    if strange:
        raise UserError(
            f"The adapter in {directory} has other layers than lora.target_modules (with lora.tower and lora.merger) asks "
            f"for, first {strange[0]!r}."
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
    fuse_lora(model)
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
