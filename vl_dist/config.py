"""From a recipe and `section.key=value` words to the frozen tree of settings, and back.

Defaults stand here, a recipe (YAML) overrides them, and words on the command line override both. A key that is not in
the tree is an error that names the nearest one. Only this module knows OmegaConf; all others take the frozen tree.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vl_dist.errors import UserError
from vl_dist.lora_keys import take_targets
from vl_dist.rules import RULES, check_rules_between
from vl_dist.settings import Config, TrainFile

DEFAULT_RECIPE = Path("recipes/shapes.yaml")


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
    merged, targets = OmegaConf.structured(Config), Config().lora.target_modules
    for source, values in given:
        _spell_out_train_files(values, source)
        targets = take_targets(values, source) or targets
        _spell_out_off(values)
        for path, value in _leaves(values):
            _refuse_unknown(path, value, source)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(values))
        except OmegaConfBaseException as error:
            raise UserError(_wrong_value(error, source)) from None
    config = _with_train_files(OmegaConf.to_object(merged))  # type: ignore[arg-type]
    config = replace(config, lora=replace(config.lora, target_modules=targets))
    _check_rules(config)
    return config


def dump(config: Config) -> str:
    """The tree as plain YAML, which any reader of YAML takes; itself a valid recipe."""
    return str(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


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
    return [Change(path=k.path, before=plain(old), after=plain(new), trains=k.trains) for k, old, new in rows if old != new]


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
        default = "null" if k.default is None else str(plain(k.default))
        lines.append(f"{k.path}  ({k.type}{unit}; default {default})\n    {k.meaning}")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """A value of the tree, or the tree, as what YAML and a person know: texts, numbers, lists, mappings."""
    if isinstance(value, TrainFile) and value.weight == 1.0:
        return str(value.path)
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        items = [plain(item) for item in value]
        return items[0] if len(items) == 1 and isinstance(value[0], TrainFile) else items
    return str(value) if isinstance(value, Path) else value


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
    if get_origin(hint) is tuple:
        return None
    candidates = [hint, *get_args(hint)]
    return next((c for c in candidates if isinstance(c, type) and is_dataclass(c)), None)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_args(hint) == (TrainFile, ...):
        return "path | list of path or {path, weight}"
    if hint is Any:
        return "list of text | text"
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


def _spell_out_train_files(values: dict[str, Any], source: str) -> None:
    """Writes data.train as a list of mappings, the one form that OmegaConf checks."""
    data = values.get("data")
    if not isinstance(data, dict) or "train" not in data:
        return
    given = data["train"] if isinstance(data["train"], list) else [data["train"]]
    for item in given:
        names = item.keys() if isinstance(item, dict) else set()
        weight = item.get("weight", 1) if isinstance(item, dict) else 1
        known = "path" in names and not names - {"path", "weight"} and isinstance(item["path"], str)
        if not isinstance(item, str) and not (known and type(weight) in (int, float)):
            raise UserError(
                f"data.train in {source} is {data['train']!r}, but must be a path, or a list whose items are paths or "
                "{path: PATH, weight: NUMBER}."
            )
    data["train"] = [{"path": item} if isinstance(item, str) else item for item in given]


def _spell_out_off(values: dict[str, Any]) -> None:
    """YAML 1.1 reads `off` as false."""
    log = values.get("log")
    if isinstance(log, dict) and log.get("wandb") is False:
        log["wandb"] = "off"


def _with_train_files(config: Config) -> Config:
    """OmegaConf gives the items of a tuple as plain mappings."""
    given: Any = config.data.train
    files = tuple(
        item if isinstance(item, TrainFile) else TrainFile(path=Path(item["path"]), weight=float(item.get("weight", 1.0)))
        for item in given
    )
    return replace(config, data=replace(config.data, train=files))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse_unknown(path: str, value: Any, source: str) -> None:
    known = [k.path for k in keys()]
    sections = {k.rsplit(".", 1)[0] for k in known}
    if path in known:
        return
    if path not in sections:
        nearest = max(known, key=lambda candidate: _likeness(path, candidate))
        raise UserError(f"Unknown key {path} in {source}. The nearest key is {nearest}. All keys: python train.py --help")
    if value != {} and not (path == "shapes" and value is None):
        raise UserError(f"{path} is a section of keys, but {source} gives it the value {value!r}. Write {path}.KEY=value.")


def _likeness(path: str, candidate: str) -> float:
    """How alike two keys are; the last part counts beside the whole, so that `lr` is near `optim.lr`."""
    pairs = ((path, candidate), (path.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]))
    return sum(difflib.SequenceMatcher(None, one, other).ratio() for one, other in pairs)


def _wrong_value(error: OmegaConfBaseException, source: str) -> str:
    path = getattr(error, "full_key", None) or ""
    first_line = str(error).splitlines()[0].strip()
    wanted = next((f" It must be: {k.type}." for k in keys() if k.path == path), "")
    where = f"The value of {path}" if path else "A section"
    return f"{where} in {source} cannot be used: {first_line}.{wanted} All keys: python train.py --help"


def _check_rules(config: Config) -> None:
    for found in keys():
        value = value_at(config, found.path)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{found.path} is {value}, but must be a finite number.")
    for path, (holds, rule) in RULES.items():
        value = value_at(config, path)
        if value is not None and not holds(value):
            raise UserError(f"{path} is {plain(value)!r}, but {rule}.")
    check_rules_between(config)
