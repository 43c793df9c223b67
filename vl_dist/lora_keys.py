"""Keys of LoRA whose types do not say what they may hold: which layers, which first weights, which learning rates."""

import re
from typing import Any

from vl_dist.errors import UserError
from vl_dist.settings import Config, TargetModules

INITIAL_WEIGHTS = ("default", "gaussian", "orthogonal")
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
NEED_MORE = ("eva", "lora_ga", "mica")


def take_targets(values: dict[str, Any], source: str) -> TargetModules | None:
    """Takes lora.target_modules out of a tree of given values, because OmegaConf cannot hold a list or a text.

    Args:
        values: sections of keys; afterwards without this one.
        source: where they come from, for messages.

    Returns:
        A list of names, or a regular expression; None: not given.

    Raises:
        UserError: neither.
    """
    lora = values.get("lora")
    if not isinstance(lora, dict):
        return None
    if lora.get("init_lora_weights") is True:  # what PEFT calls it
        lora["init_lora_weights"] = "default"
    if "target_modules" not in lora:
        return None
    given = lora.pop("target_modules")
    names = given if isinstance(given, list) else []
    if not given or not (isinstance(given, str) or (names and all(type(name) in (str, int) for name in names))):
        raise UserError(
            f"lora.target_modules in {source} is {given!r}, but must be a list of names, [q_proj, v_proj], or one text, a "
            "regular expression for the whole path of a layer."
        )
    return given if isinstance(given, str) else tuple(str(name) for name in names)


def check_lora(config: Config) -> None:
    """Raises `UserError` where keys of LoRA hold what cannot be, or do not go together."""
    lora, optim = config.lora, config.optim
    if isinstance(lora.target_modules, str):
        try:
            re.compile(lora.target_modules)
        except re.error as error:
            raise UserError(
                f"lora.target_modules is {lora.target_modules!r}, which is no regular expression ({error}). For names give "
                "a list, [q_proj, v_proj]."
            ) from None
    if lora.init_lora_weights not in INITIAL_WEIGHTS:
        raise UserError(_why_not(lora.init_lora_weights))
    if lora.init_lora_weights == "orthogonal" and lora.r % 2:
        raise UserError(f"lora.init_lora_weights=orthogonal needs an even lora.r, but it is {lora.r}.")
    if lora.init_from is not None and lora.init_lora_weights != "default":
        raise UserError("lora.init_from brings the weights: leave out lora.init_lora_weights, or lora.init_from.")
    for part, rate, trains in (("tower", optim.lr_tower, lora.tower), ("merger", optim.lr_merger, lora.merger)):
        if rate is not None and not trains:
            raise UserError(f"optim.lr_{part} is {rate:g}, but lora.{part}=false trains nothing there. Set one of the two.")


def _why_not(name: str) -> str:
    reason = "which is not known"
    if name.lower().startswith(CHANGE_THE_BASE):
        reason = "which changes the frozen base, so that the saved adapter would not fit the base that everyone else has"
    elif name.lower().startswith(NEED_MORE):
        reason = "which needs a pass over the data first, or trains other matrices"
    return f"lora.init_lora_weights is {name!r}, {reason}. It must be one of: {', '.join(INITIAL_WEIGHTS)}."
