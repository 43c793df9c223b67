"""vLLM's rules for a LoRA adapter, and the command that serves one.

Sources, in vllm-project/vllm: `vllm/lora/peft_helper.py` (`PEFTHelper.validate_legal`: no DoRA, no modules_to_save, no
bias, the rank; `__post_init__`: one scale for all layers), `vllm/config/lora.py` (`MaxLoRARanks`,
`enable_tower_connector_lora`), `LoRAModel.from_local_checkpoint` (`check_unexpected_modules`: every key of the file must
end in the name of a linear layer) and `hf_to_vllm_mapper` of its Qwen-VL models, which renames `model.language_model.` and
`model.visual.`. LoRA on the tower is experimental there, and dropped with a warning without its flag.
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vl_dist.adapter.load import LoadedAdapter
from vl_dist.data.images import area_bounds
from vl_dist.data.records import ImagePart
from vl_dist.run.files import METADATA

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER_LAYERS = ("qkv", "proj", "fc1", "fc2", "0", "2")  # 0 and 2 are the merger's
KEY_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
LANGUAGE, TOWER = "model.language_model.layers.", "model.visual."  # what vLLM's mapper of Qwen2-VL renames


def obstacles(settings: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Why vLLM would refuse an adapter, or serve another function than was trained; none: it serves it.

    Args:
        settings: of adapter_config.json.
        names: of the tensors in its file.
    """
    found = []
    if settings["r"] > MAX_RANKS[-1]:
        found.append(f"its rank is {settings['r']}, vLLM goes up to {MAX_RANKS[-1]}")
    if settings.get("use_dora"):
        found.append("it is DoRA, which vLLM does not load")
    if settings.get("modules_to_save"):
        found.append(f"it replaces whole modules ({', '.join(settings['modules_to_save'])}), which vLLM does not load")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        found.append("it trains biases, which vLLM does not load")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        found.append("its layers differ in rank or alpha, vLLM scales all of them alike")
    # DoRA's magnitudes are named above.
    strange = sorted(name for name in names if not _loads(name) and not (settings.get("use_dora") and _MAGNITUDE in name))
    if strange:
        found.append(f"vLLM has no LoRA for {len(strange)} of its tensors, first {strange[0]}")
    return found


def max_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds an adapter of this rank."""
    return next(limit for limit in MAX_RANKS if limit >= rank)


def serving_command(adapter: LoadedAdapter, settings: dict[str, Any], names: Iterable[str]) -> str:
    """The shell command that serves an adapter without obstacles, with its pixels and its chat template.

    Args:
        settings, names: as for `obstacles`.
    """
    base, contract = adapter.contract.base_model, adapter.contract
    on_hub = base.hub != "local"
    low, high = area_bounds(contract.budget, adapter.shape)
    num_images = sum(isinstance(part, ImagePart) for message in contract.prompt for part in message.parts)
    words = ["vllm", "serve", base.path if on_hub else str(adapter.base_dir.resolve())]
    if on_hub and base.revision is not None:
        words += ["--revision", base.revision]
    words += ["--enable-lora", "--max-lora-rank", str(max_rank(settings["r"]))]
    words += ["--lora-modules", f"adapter={adapter.directory.resolve()}"]
    if _is_in_tower(names):
        words.append("--enable-tower-connector-lora")
    words += ["--chat-template", str((adapter.directory / "chat_template.jinja").resolve())]
    words += ["--limit-mm-per-prompt", json.dumps({"image": max(1, num_images)})]
    if contract.budget.resized_height is None:
        words += ["--mm-processor-kwargs", json.dumps({"min_pixels": low, "max_pixels": high})]
    command = shlex.join(words)
    return f"VLLM_USE_MODELSCOPE=True {command}" if base.hub == "modelscope" else command


def notes(adapter: LoadedAdapter, names: Iterable[str]) -> list[str]:
    """What whoever sends requests must do that the command cannot, and what to expect.

    Args:
        names: as for `obstacles`.
    """
    contract, found = adapter.contract, []
    prompt = " / ".join(message.text for message in contract.prompt)
    found.append(f"ask model 'adapter', temperature 0, the image before the text {prompt!r}")
    if contract.budget.resized_height is not None:
        size = f"{contract.budget.resized_width}x{contract.budget.resized_height}"
        found.append(f"resize every image to {size} pixels (width x height) before sending it: vLLM has no option for that")
    found.append(f"stop_token_ids {list(adapter.encoder.stop_ids)}, max_tokens {contract.max_new_tokens} (of {METADATA})")
    if _is_in_tower(names):
        found.append("LoRA on the tower and the merger is experimental in vLLM: compare its captions with those of predict")
    return found


def _is_in_tower(names: Iterable[str]) -> bool:
    return any(name.removeprefix(KEY_PREFIX).startswith(TOWER) for name in names)


def _loads(name: str) -> bool:
    if not name.startswith(KEY_PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
        return False
    module = Path(name.removeprefix(KEY_PREFIX)).stem.rsplit(".", 1)[0]
    leaf = module.rsplit(".", 1)[-1]
    if module.startswith(LANGUAGE):
        return leaf in LANGUAGE_LAYERS
    return module.startswith(TOWER) and leaf in TOWER_LAYERS
