"""Which layers `model.recompute` means."""

import re


def is_recompute(setting: str) -> bool:
    """Whether a setting is none, all, or every_N with N of 2 or more."""
    return re.fullmatch(r"none|all|every_([2-9]|[1-9]\d+)", setting) is not None


def recomputed_layers(setting: str, num_layers: int) -> range:
    """The numbers of those layers: none, all, or every N-th from the first on."""
    if setting == "none":
        return range(0)
    return range(0, num_layers, 1 if setting == "all" else int(setting.removeprefix("every_")))
