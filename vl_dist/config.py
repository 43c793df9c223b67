"""Every setting of a run: one frozen tree, read from a recipe and from `section.key=value` words.

Defaults stand here, a recipe (YAML) overrides them, and words on the command line override both. A key that is not in
the tree is an error that names the nearest one. Only this module knows OmegaConf; all others take the frozen tree.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vl_dist.errors import UserError

DEFAULT_RECIPE = Path("recipes/shapes.yaml")


def key(default: Any, meaning: str, unit: str = "", *, trains: bool = True) -> Any:
    """A setting. `trains` says that another value would train something else, so that a run cannot go on with it."""
    metadata = {"meaning": meaning, "unit": unit, "trains": trains}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesConfig:
    """The embedded default's drawings and tiny model, made on the spot."""

    dir: Path = key(Path("data/shapes"), "where the drawings, records and the tiny model are made")
    seed: int = key(0, "seed of the drawings and of the tiny model's random weights")
    num_train: int = key(1000, "drawings to train on, five captions each", "images")
    num_eval: int = key(120, "drawings held out", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model and how it computes."""

    path: str = key("Qwen/Qwen2-VL-2B-Instruct", "a directory, or the model's name on the hub")
    hub: Literal["local", "modelscope", "huggingface"] = key("local", "where the model comes from", trains=False)
    revision: str | None = key(None, "revision on the hub; null: the hub's default branch")
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "precision of the base weights; auto: bfloat16 on CUDA, float32 on a CPU (LoRA is always float32)"
    )
    attention: Literal["auto", "sdpa", "eager"] = key("auto", "attention of the language model; auto: sdpa", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapter."""

    r: int = key(64, "rank of the update", "dimensions")
    alpha: float = key(16.0, "the update is scaled by alpha / r")
    dropout: float = key(0.05, "dropout on the input of the update", "probability")
    target_modules: tuple[str, ...] = key(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "names of the linear layers that get an update",
    )
    init_from: Path | None = key(None, "adapter directory to start from; null: fresh weights, B zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which records, and how they become tokens and patches."""

    train: Path = key(Path("data_vl.json"), "training records: records.jsonl, or the tutorial's data_vl.json")
    eval: str | None = key(None, "held-out records: a file, or last:N of the training records; null: train on every record")
    image_root: Path | None = key(None, "image paths are relative to this folder; null: the record file's folder")
    resized_height: int | None = key(None, "every image is resized to this height", "pixels")
    resized_width: int | None = key(None, "every image is resized to this width", "pixels")
    min_pixels: int | None = key(None, "smaller images are enlarged to this area; null: 3,136", "pixels")
    max_pixels: int | None = key(None, "larger images are shrunk to this area; null: 12,845,056", "pixels")
    prompt: str = key("COCO Yes:", "prompt after the image, for data_vl.json and for predict")
    end_token: str | None = key(
        None, "token that ends the last answer; null: the chat template's own (earlier turns always keep it)"
    )
    shuffle: bool = key(True, "shuffle examples anew each epoch; false: steps are consecutive examples")
    num_workers: int = key(2, "processes that decode and encode for each rank; 0: in the training process", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What one optimizer step holds."""

    examples_per_step: int = key(4, "examples in one optimizer step, over all ranks", "examples")
    max_tokens_per_pack: int = key(8192, "most tokens in one micro-batch row", "tokens", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) and its schedule."""

    lr: float = key(1e-4, "highest learning rate")
    schedule: Literal["linear", "cosine", "constant"] = key("linear", "how the learning rate falls after the warm-up")
    warmup_steps: int = key(0, "the learning rate rises linearly from 0 over these steps", "steps")
    weight_decay: float = key(0.0, "decoupled weight decay")
    max_grad_norm: float | None = key(1.0, "gradients are scaled down to this norm; null: never")
    num_epochs: int = key(2, "passes over the training records", "epochs")
    max_steps: int | None = key(None, "end after this many steps; null: after num_epochs", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """How often training is made safe."""

    every_steps: int = key(100, "steps between checkpoints; the last step always has one", "steps", trains=False)
    keep: int | None = key(3, "checkpoints kept; null: all; latest is never removed", "checkpoints", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Captions and loss on the held-out records, at the start, at the end and between."""

    every_steps: int | None = key(None, "steps between evaluations; null: start and end only", "steps", trains=False)
    batch_size: int = key(16, "images captioned together on one rank", "images", trains=False)
    max_new_tokens: int = key(64, "longest caption", "tokens", trains=False)
    num_shown: int = key(4, "held-out captions printed at each evaluation", "captions", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written down while training."""

    every_steps: int = key(10, "steps between rows of metrics.jsonl", "steps", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run lives and how it is repeated."""

    output_dir: Path = key(Path("runs/latest"), "what the run leaves behind", trains=False)
    seed: int = key(0, "seed of data order, LoRA weights and dropout")
    resume: str = key("auto", "auto: newest complete checkpoint; never: from step 0; or a directory", trains=False)
    allow_changes: bool = key(False, "go on with a run although settings that shape it changed", trains=False)
    cpu_threads: int | None = key(None, "threads of each rank on a CPU; null: its share of cores", "threads", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of one run."""

    shapes: ShapesConfig | None = key(None, "the embedded default's data and model; null: none are made")
    model: ModelConfig = key(ModelConfig, "")
    lora: LoraSettings = key(LoraSettings, "")
    data: DataConfig = key(DataConfig, "")
    batch: BatchConfig = key(BatchConfig, "")
    optim: OptimConfig = key(OptimConfig, "")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "")
    eval: EvalConfig = key(EvalConfig, "")
    log: LogConfig = key(LogConfig, "")
    run: RunConfig = key(RunConfig, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One setting as `--help` shows it."""

    path: str
    type: str
    unit: str
    default: Any
    meaning: str
    trains: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting with another value than before."""

    path: str
    before: Any
    after: Any
    trains: bool


def _above(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value is None or value > low), f"must be above {low}"


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value is None or value >= low), f"must be {low} or more"


# What no type says. Paths of keys, and the rule that their value keeps.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shapes.num_train": _at_least(1),
    "shapes.num_eval": _at_least(1),
    "lora.r": _at_least(1),
    "lora.alpha": _above(0),
    "lora.dropout": ((lambda value: 0 <= value < 1), "must be at least 0 and below 1"),
    "lora.target_modules": ((lambda value: len(value) > 0), "must name at least one layer"),
    "data.resized_height": _at_least(1),
    "data.resized_width": _at_least(1),
    "data.min_pixels": _at_least(1),
    "data.max_pixels": _at_least(1),
    "data.num_workers": _at_least(0),
    "batch.examples_per_step": _at_least(1),
    "batch.max_tokens_per_pack": _at_least(1),
    "optim.lr": _above(0),
    "optim.warmup_steps": _at_least(0),
    "optim.weight_decay": _at_least(0),
    "optim.max_grad_norm": _above(0),
    "optim.num_epochs": _at_least(1),
    "optim.max_steps": _at_least(1),
    "checkpoint.every_steps": _at_least(1),
    "checkpoint.keep": _at_least(2),
    "eval.every_steps": _at_least(1),
    "eval.batch_size": _at_least(1),
    "eval.max_new_tokens": _at_least(1),
    "eval.num_shown": _at_least(0),
    "log.every_steps": _at_least(1),
    "run.cpu_threads": _at_least(1),
}


def split_words(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The recipe and the `section.key=value` words of a command line; without a recipe, the default one."""
    if words and "=" not in words[0]:
        return Path(words[0]), list(words[1:])
    return DEFAULT_RECIPE, list(words)


def load(recipe: Path | None, words: Sequence[str] = ()) -> Config:
    """The settings of a run: defaults, then the recipe, then `section.key=value` words.

    Raises:
        UserError: a missing or broken recipe, an unknown key, a wrong type, or a value that breaks a rule.
    """
    given = [("the recipe " + str(recipe), _read_yaml(recipe))] if recipe is not None else []
    given.append(("the command line", _parse_words(words)))
    merged = OmegaConf.structured(Config)
    for source, values in given:
        for path in _paths(values):
            _refuse_unknown(path, source)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(values))
        except OmegaConfBaseException as error:
            raise UserError(_wrong_value(error, source)) from None
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    _check_rules(config)
    return config


def dump(config: Config) -> str:
    """The tree as YAML; itself a valid recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def keys() -> list[Key]:
    """Every setting, in the order of the tree."""
    return list(_keys(Config, ""))


def value_at(config: Config, path: str) -> Any:
    """The value at a dotted path; None below a section that is null."""
    value: Any = config
    for part in path.split("."):
        value = None if value is None else getattr(value, part)
    return value


def changes(before: Config, after: Config) -> list[Change]:
    """Settings whose values differ, in the order of the tree."""
    rows = [(k, value_at(before, k.path), value_at(after, k.path)) for k in keys()]
    return [Change(path=k.path, before=old, after=new, trains=k.trains) for k, old, new in rows if old != new]


def help_text() -> str:
    """One line a setting: path, type, unit, default, meaning."""
    lines = [
        "train.py [RECIPE.yaml] [section.key=value ...]",
        "",
        f"Fine-tunes Qwen2-VL with LoRA. Without a recipe: {DEFAULT_RECIPE}. Start it with: accelerate launch train.py",
        "",
    ]
    for k in keys():
        unit = f" in {k.unit}" if k.unit else ""
        default = "null" if k.default is None else str(k.default)
        lines.append(f"{k.path}  ({k.type}{unit}; default {default})\n    {k.meaning}")
    return "\n".join(lines)


def _keys(section: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for item in fields(section):
        inner = _section_type(hints[item.name])
        if inner is not None:
            yield from _keys(inner, f"{prefix}{item.name}.")
            continue
        assert item.default is not MISSING
        yield Key(
            path=prefix + item.name,
            type=_type_name(hints[item.name]),
            unit=item.metadata["unit"],
            default=item.default,
            meaning=item.metadata["meaning"],
            trains=item.metadata["trains"],
        )


def _section_type(hint: Any) -> type | None:
    candidates = [hint, *get_args(hint)]
    return next((c for c in candidates if isinstance(c, type) and is_dataclass(c)), None)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type_name(get_args(hint)[0])}"
    if get_args(hint):
        return " | ".join(_type_name(part) for part in get_args(hint))
    name = str(hint.__name__)
    names = {"NoneType": "null", "str": "text", "Path": "path", "int": "integer", "float": "number", "bool": "true | false"}
    return names.get(name, name)


def _read_yaml(recipe: Path) -> dict[str, Any]:
    if not recipe.is_file():
        raise UserError(f"There is no recipe {recipe}. Give a YAML file, or leave it out for {DEFAULT_RECIPE}.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(recipe), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"The recipe {recipe} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"The recipe {recipe} must hold sections of keys (like 'optim:'), but holds {values!r}.")
    return values  # type: ignore[return-value]


def _parse_words(words: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise UserError(f"Got {word!r} on the command line; settings are written section.key=value.")
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"Got {word!r}, but {section} was already given a value before it.")
        node[name] = _parse_value(text)
    return tree


def _parse_value(text: str) -> Any:
    """A YAML value; what YAML would read as a mapping ('COCO Yes:') is text unless it is in braces."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text
    # YAML 1.1 reads 1e-4 as text; OmegaConf converts it where the key is a number.
    return value


def _paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _refuse_unknown(path: str, source: str) -> None:
    known = [k.path for k in keys()]
    sections = {k.rsplit(".", 1)[0] for k in known}
    if path in known or path in sections:
        return
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
    raise UserError(f"Unknown key {path} in {source}. The nearest key is {nearest}. All keys: python train.py --help")


def _wrong_value(error: OmegaConfBaseException, source: str) -> str:
    path = getattr(error, "full_key", None) or ""
    first_line = str(error).splitlines()[0].strip()
    wanted = next((f" It must be: {k.type}." for k in keys() if k.path == path), "")
    where = f"The value of {path}" if path else "A section"
    return f"{where} in {source} cannot be used: {first_line}.{wanted} All keys: python train.py --help"


def _check_rules(config: Config) -> None:
    for path, (holds, rule) in RULES.items():
        value = value_at(config, path)
        if value is not None and not holds(value):
            raise UserError(f"{path} is {value!r}, but {rule}.")
    data = config.data
    if (data.resized_height is None) != (data.resized_width is None):
        raise UserError("data.resized_height and data.resized_width go together: give both or neither.")
    if data.resized_height is not None and (data.min_pixels is not None or data.max_pixels is not None):
        raise UserError(
            "data.resized_height/resized_width fix the size, data.min_pixels/max_pixels bound it: give one of the two."
        )
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise UserError(f"data.min_pixels ({data.min_pixels}) is above data.max_pixels ({data.max_pixels}).")
    if data.eval is not None and data.eval.startswith("last:"):
        held_out_count(data.eval)


def held_out_count(spec: str) -> int:
    """N of `last:N`, the form of `data.eval` that holds out training records.

    Raises:
        UserError: what stands after `last:` is not a whole number above 0.
    """
    count = spec.removeprefix("last:")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"data.eval is {spec!r}; write last:N with a whole number N of 1 or more, or a file.")
    return int(count)
