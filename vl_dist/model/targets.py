"""Which linear layers get LoRA: `lora.target_modules` within the parts of the model that `lora.tower`/`lora.merger` open.

Names and shapes come from the model's `config.json` alone, so that a plan knows what training will train.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vl_dist.errors import UserError
from vl_dist.model.flops import LoraSize, ModelShape
from vl_dist.settings import LoraSettings

Part = Literal["language model", "tower", "merger"]
PARTS: tuple[Part, ...] = get_args(Part)
LANGUAGE, TOWER, MERGER = "model.language_model.layers.", "model.visual.blocks.", "model.visual.merger."
HEAD = "lm_head"  # often the embedding's own weight, which LoRA on the head would then have to leave


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that get LoRA, and those that only another setting would reach."""

    layers: dict[Part, tuple[str, ...]]  # by their paths in the base model, in its order
    left_out: dict[Part, int]  # layers that the names or the expression match, in parts that are not open

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [name for part in PARTS for name in self.layers[part]]


def part_of(name: str) -> Part:
    """The part of the model that a layer or a parameter lies in."""
    if "visual.merger." in name:
        return "merger"
    return "tower" if "visual." in name else "language model"


def linear_layers(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer but the head, by its path in Qwen2-VL."""
    width, wide = shape.tower_width, shape.tower_width * shape.merged_patches
    block = {
        "attn.qkv": (width, 3 * width),
        "attn.proj": (width, width),
        "mlp.fc1": (width, shape.tower_mlp),
        "mlp.fc2": (shape.tower_mlp, width),
    }
    language = {
        f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}": size
        for name, size in shape.linear_sizes.items()
    }
    return {
        **{f"{TOWER}{n}.{name}": size for n in range(shape.tower_depth) for name, size in block.items()},
        f"{MERGER}mlp.0": (wide, wide),
        f"{MERGER}mlp.2": (wide, shape.hidden),
        **{f"{LANGUAGE}{n}.{name}": size for n in range(shape.layers) for name, size in language.items()},
    }


def choose_targets(lora: LoraSettings, linears: Iterable[str]) -> Targets:
    """The layers that the settings mean.

    A name matches a layer that has it as its path or as the end of it, as in PEFT; an expression must match the whole path.
    Only linear layers count, and the head never does. The tower and the merger are reached with their keys alone.

    Args:
        linears: paths of the base's linear layers.

    Raises:
        UserError: a name, the expression, or an open part matches nothing.
    """
    known = [name for name in linears if name != HEAD]
    matched = [name for name in known if any(_matches(one, name) for one in _each(lora))]
    is_open = {"language model": True, "tower": lora.tower, "merger": lora.merger}
    layers: dict[Part, tuple[str, ...]] = dict.fromkeys(PARTS, ())
    left_out: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for part in PARTS:
        found = tuple(name for name in matched if part_of(name) == part)
        layers[part], left_out[part] = (found, 0) if is_open[part] else ((), len(found))
    chosen = Targets(layers, left_out)
    for one in _each(lora):
        if not any(_matches(one, name) for name in chosen.names):
            raise UserError(_nothing(one, [part_of(name) for name in known if _matches(one, name)], known))
    for part in ("tower", "merger"):
        if is_open[part] and not layers[part]:
            raise UserError(
                f"lora.{part} is true, but lora.target_modules ({_shown(lora)}) matches no layer there. {_there_are(known)}"
            )
    return chosen


def lora_size(shape: ModelShape, lora: LoraSettings) -> LoraSize:
    """How large the adapter is, and how deep its gradient goes.

    Raises:
        UserError: as `choose_targets`.
    """
    sizes = linear_layers(shape)
    targets = choose_targets(lora, sizes)

    def values(part: Part) -> int:
        """Matrices A and B, and DoRA's magnitudes."""
        chosen = [sizes[name] for name in targets.layers[part]]
        return sum(lora.r * (inputs + outputs) + (outputs if lora.dora else 0) for inputs, outputs in chosen)

    def lowest(prefix: str, depth: int) -> int:
        return min((int(name.removeprefix(prefix).split(".")[0]) for name in targets.names if name.startswith(prefix)),
                   default=depth)  # fmt: skip

    sees_images = bool(targets.layers["tower"] or targets.layers["merger"])
    return LoraSize(
        language=values("language model"),
        tower=values("tower"),
        merger=values("merger"),
        layers_without_gradient=0 if sees_images else lowest(LANGUAGE, shape.layers),
        blocks_without_gradient=lowest(TOWER, shape.tower_depth),
    )


def describe_targets(targets: Targets, num_values: Mapping[Part, int]) -> str:
    """What is trained, part by part, for the panel at the start.

    Args:
        num_values: trainable values of each part.
    """
    return "; ".join(_describe_part(part, targets, num_values[part]) for part in PARTS)


def describe_lora(lora: LoraSettings) -> str:
    """The settings of the adapter in words."""
    words = [f"rank {lora.r}", f"alpha {lora.alpha:g}"]
    words += ["rsLoRA"] * lora.rslora + ["DoRA"] * lora.dora
    words += [f"{lora.init_lora_weights} first weights"] * (lora.init_lora_weights != "default")
    parts = " and ".join(["language model", *["tower"] * lora.tower, *["merger"] * lora.merger])
    return f"{', '.join(words)}, on {_shown(lora)} of {parts}"


def _describe_part(part: Part, targets: Targets, num_values: int) -> str:
    layers, left_out = len(targets.layers[part]), targets.left_out[part]
    if layers:
        return f"{part} {layers:,} layers, {num_values:,} parameters"
    return f"{part} none" + (f" ({left_out:,} matching layers left out, as lora.{part} is false)" if left_out else "")


def _each(lora: LoraSettings) -> list[str | re.Pattern[str]]:
    targets = lora.target_modules
    return [re.compile(targets)] if isinstance(targets, str) else list(targets)


def _matches(target: str | re.Pattern[str], name: str) -> bool:
    if isinstance(target, str):
        return name == target or name.endswith(f".{target}")
    return target.fullmatch(name) is not None


def _shown(lora: LoraSettings) -> str:
    targets = lora.target_modules
    return repr(targets) if isinstance(targets, str) else ", ".join(targets)


def _nothing(target: str | re.Pattern[str], closed: list[Part], known: list[str]) -> str:
    """Why a target is refused. `closed`: the parts of the layers that it matches, none of them open."""
    if isinstance(target, str):
        what = f"lora.target_modules names {target!r}, which "
    else:
        what = f"lora.target_modules is the regular expression {target.pattern!r}, whose whole "
    if closed:
        keys = " and ".join(f"lora.{part}=true" for part in PARTS if part in closed)
        where = " and ".join(f"the {part}" for part in PARTS if part in closed)
        has = "is only in" if isinstance(target, str) else "matches layers only in"
        return f"{what}{has} {where}. Set {keys} to train there too, or take it out."
    if isinstance(target, str):
        return f"{what}no linear layer of this model is called. {_there_are(known)}"
    example = next((name for name in known if name.startswith(LANGUAGE)), known[0])
    return (
        f"{what}matches the path of no linear layer, like {example}. For names give a list, [q_proj, v_proj]. "
        f"{_there_are(known)}"
    )


def _there_are(known: list[str]) -> str:
    names: dict[Part, list[str]] = {part: [] for part in PARTS}
    for name in known:
        *_, parent, last = name.split(".")
        short = f"{parent}.{last}" if last.isdigit() else last
        if short not in names[part_of(name)]:
            names[part_of(name)].append(short)
    return "There are: " + "; ".join(f"in the {part} {', '.join(sorted(found))}" for part, found in names.items()) + "."
