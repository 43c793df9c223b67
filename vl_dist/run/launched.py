"""What the recipe, accelerate's YAML and DeepSpeed's JSON must agree on: checked and filled in before anything is loaded.

The recipe decides. Clipping, precision, micro-batch and accumulation need no place in the other files; where they have one,
it must hold the same value, because each library would silently follow its own.
"""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_dist.errors import UserError
from vl_dist.settings import Config

CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
PRECISION = "precision"
ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Shared:
    """A value that the recipe decides and other sides must know."""

    name: str
    value: Any
    set_by: str
    json_key: str | None = None  # where DeepSpeed's JSON has it
    variable: str | None = None  # the environment variable that accelerate's YAML becomes
    same: tuple[str, ...] = ()  # other ways to write the value


@dataclass(frozen=True, slots=True)
class Clash:
    """Two values for one thing, and where each comes from."""

    name: str
    recipe: str
    other: str


@dataclass(frozen=True, slots=True)
class Launch:
    """How the launcher started this process, in agreement with the recipe."""

    world_size: int  # ranks that it announced
    deepspeed: dict[str, Any] | None  # DeepSpeed's whole configuration; None: plain data parallel, or one process
    deepspeed_from: str  # where that came from
    shared: tuple[Shared, ...]

    @property
    def zero_stage(self) -> int | None:
        """The stage of DeepSpeed ZeRO; None without DeepSpeed."""
        return None if self.deepspeed is None else int(self.deepspeed["zero_optimization"]["stage"])

    def describe(self, precision: str) -> str:
        """The engine, and every shared value with who set it.

        Args:
            precision: of the base model, as `model.dtype` came out on this device.
        """
        engine = "plain" if self.deepspeed is None else f"DeepSpeed ZeRO {self.zero_stage} ({self.deepspeed_from})"
        values = [(one, precision if one.name == PRECISION else one.value) for one in self.shared]
        return "; ".join([engine, *(f"{one.name} {value} ({one.set_by})" for one, value in values)])


def read_launch(config: Config, env: Mapping[str, str]) -> Launch:
    """What the launcher's environment variables say, checked against the recipe.

    Args:
        env: the environment of this process.

    Raises:
        UserError: the files contradict each other (one table of both values), DeepSpeed's cannot be read, or its stage
            cannot do what the recipe asks for.
    """
    shared = _shared(config)
    world_size = int(env.get("WORLD_SIZE", "1"))
    clashes = [clash for one in shared if (clash := _clash_in_environment(one, env)) is not None]
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        _refuse_clashes(clashes)
        return Launch(world_size, None, "", shared)
    path = env.get(CONFIG_FILE)
    source = path if path is not None else "accelerate's configuration"
    given = _read_json(Path(path)) if path is not None else _from_environment(env)
    clashes += _clashes_in_json(given, source, shared, config, env, world_size)
    _refuse_clashes(clashes)
    _refuse_with_stage_3(config, given["zero_optimization"]["stage"])
    if config.run.compile:
        # ZeRO 1 and 2 sum gradients over ranks in the order in which each rank happens to get them: compiled code and a
        # filler that ran without it have them in different orders, and the sums mix parameters. ZeRO 3 takes weights away
        # between the operations that would be compiled together.
        raise UserError(
            f"run.compile=true cannot be used with DeepSpeed ({source}), which relies on every rank having its gradients "
            "in the same order. Set run.compile=false, or launch with ddp.yaml."
        )
    filled = _filled(given, shared, world_size)
    autos = [key for key, value in _leaves(filled) if value == "auto"]
    if autos:
        raise UserError(
            f"{source} leaves {', '.join(autos)} to be guessed ('auto'). Give a number, or leave the key out for "
            "DeepSpeed's default."
        )
    return Launch(world_size, filled, source, shared)


def refuse_lost_ranks(env: Mapping[str, str], num_joined: int) -> None:
    """Makes sure that a launch of several processes has not become several runs of one.

    Args:
        env: the environment of this process.
        num_joined: ranks of the process group that accelerate made.

    Raises:
        UserError: more were announced.
    """
    announced = max(int(env.get(name, "1")) for name in ("WORLD_SIZE", *MPI_SIZES))
    # Without MPI, accelerate's launcher starts one process for a configuration of several on the CPU: it gives an address
    # to meet at, and no rank to anyone.
    one_of_many = "ACCELERATE_USE_CPU" in env and "MASTER_ADDR" in env and "WORLD_SIZE" not in env
    if num_joined == 1 and (announced > 1 or one_of_many):
        several = f"{announced} processes" if announced > 1 else "several processes (it set MASTER_ADDR, but no rank)"
        raise UserError(
            f"The launcher announced {several}, but this one joined no other and would train alone, as if it were all. "
            "On a CPU use accelerate_configs/cpu.yaml: --cpu and MULTI_CPU start one process unless MPI is installed."
        )


def _shared(config: Config) -> tuple[Shared, ...]:
    clipping = config.optim.max_grad_norm
    return (
        Shared(
            "gradient clipping",
            0.0 if clipping is None else clipping,
            "optim.max_grad_norm",
            json_key="gradient_clipping",
            variable="ACCELERATE_GRADIENT_CLIPPING",
            same=("none",) if clipping is None else (),
        ),
        Shared("micro-batch", 1, "one pack", json_key="train_micro_batch_size_per_gpu"),
        Shared(
            "accumulation",
            1,
            "the plan gives each step its packs",
            json_key="gradient_accumulation_steps",
            variable="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ),
        Shared(
            PRECISION,
            config.model.dtype,
            "model.dtype; the adapter is float32",
            variable="ACCELERATE_MIXED_PRECISION",
            same=("no",),
        ),
    )


def _clash_in_environment(one: Shared, env: Mapping[str, str]) -> Clash | None:
    given = env.get(one.variable) if one.variable is not None else None
    if given is None or given == "auto" or given in one.same or (one.name != PRECISION and _number(given) == one.value):
        return None
    # Even the same precision is another thing there: it would cast the adapter's own arithmetic.
    advice = "; set mixed_precision to 'no'" if one.name == PRECISION else ""
    return Clash(one.name, f"{one.value} ({one.set_by})", f"{given} (accelerate's configuration{advice})")


def _clashes_in_json(
    given: Mapping[str, Any],
    source: str,
    shared: tuple[Shared, ...],
    config: Config,
    env: Mapping[str, str],
    world_size: int,
) -> Iterator[Clash]:
    for one in shared:
        value = given.get(one.json_key, "auto") if one.json_key is not None else "auto"
        if value != "auto" and value != one.value:
            yield Clash(one.name, f"{one.value} ({one.set_by})", f"{value} ({one.json_key} in {source})")
    total = given.get("train_batch_size", "auto")
    if total not in ("auto", world_size):
        yield Clash("batch", f"{world_size} (one pack on each of the ranks)", f"{total} (train_batch_size in {source})")
    for precision in ("bf16", "fp16"):
        enabled = given.get(precision, {}).get("enabled", "auto")
        if enabled not in ("auto", False):
            recipe = f"{config.model.dtype} (model.dtype; the adapter is float32)"
            yield Clash(PRECISION, recipe, f"{enabled} ({precision}.enabled in {source}; leave it out)")
    for section, recipe in (("optimizer", "AdamW (optim.*)"), ("scheduler", f"{config.optim.schedule} (optim.schedule)")):
        if section in given:
            yield Clash(section, recipe, f"{given[section].get('type')} ({section} in {source}; leave it out)")
    stage = given["zero_optimization"]["stage"]
    if ZERO_STAGE in env and int(env[ZERO_STAGE]) != stage:
        yield Clash("ZeRO stage", f"{stage} ({source})", f"{env[ZERO_STAGE]} (accelerate's configuration)")


def _refuse_with_stage_3(config: Config, stage: int) -> None:
    """What reads or packs whole frozen weights where this stage leaves each rank a share of them."""
    if stage != 3:
        return
    for name, is_set in (("lora.dora=true", config.lora.dora), ("model.quantize=4bit", config.model.quantize is not None)):
        if is_set:
            raise UserError(
                f"{name} does not work under ZeRO 3, which takes frozen weights apart. Use ddp.yaml, zero1.yaml or "
                "zero2.yaml, or leave it out."
            )


def _refuse_clashes(clashes: list[Clash]) -> None:
    if not clashes:
        return
    rows = [Clash("what", "recipe", "launcher"), *clashes]
    widths = [max(len(row.name) for row in rows), max(len(row.recipe) for row in rows)]
    table = "\n".join(f"  {row.name:{widths[0]}}  {row.recipe:{widths[1]}}  {row.other}" for row in rows)
    raise UserError(
        f"The recipe and the launcher's files do not agree:\n{table}\nThe recipe decides: take the value out of the other "
        "file, or give the recipe the same one."
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"There is no DeepSpeed configuration {path} (deepspeed_config_file). Start from the project's root."
        )
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"The DeepSpeed configuration {path} is not valid JSON: {error}") from None
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path} has zero_optimization.stage {stage!r}, but it must be 1, 2 or 3. Without ZeRO use ddp.yaml."
        )
    return dict(given)


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's configuration where accelerate's YAML gives the stage itself, without a JSON file."""
    zero: dict[str, Any] = {"stage": int(env.get(ZERO_STAGE, "2"))}
    for part in ("optimizer", "param"):
        device = env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
    return {"zero_optimization": zero}


def _filled(given: Mapping[str, Any], shared: tuple[Shared, ...], world_size: int) -> dict[str, Any]:
    """The configuration with every shared value in it, none left to be guessed."""
    filled = deepcopy(dict(given))
    filled |= {one.json_key: one.value for one in shared if one.json_key is not None}
    filled["train_batch_size"] = world_size
    # DeepSpeed would cast the whole model; here the base has model.dtype and the adapter float32, as without DeepSpeed.
    filled |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    return filled


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
