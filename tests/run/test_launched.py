"""Recipe, accelerate's YAML and DeepSpeed's JSON agree, or one table says where they do not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.processes import launcher_variables
from vl_dist.errors import UserError
from vl_dist.run.launched import read_launch, refuse_lost_ranks
from vl_dist.settings import Config, LoraSettings, ModelConfig, OptimConfig, RunConfig

ZERO = ("zero1.yaml", "zero2.yaml", "zero3.yaml", "zero3_offload.yaml")


def environment(directory: Path, deepspeed: dict[str, Any], **more: str) -> dict[str, str]:
    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | deepspeed))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "WORLD_SIZE": "2"} | more


@pytest.mark.parametrize("clipping", [None, 0.25])
@pytest.mark.parametrize("config_file", ZERO)
def test_our_configurations_take_every_shared_value_from_the_recipe(
    config_file: str, clipping: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = Config(optim=OptimConfig(max_grad_norm=clipping))
    launch = read_launch(config, launcher_variables(config_file) | {"WORLD_SIZE": "8"})
    assert launch.deepspeed is not None
    assert launch.zero_stage == int(config_file[4])
    wanted = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 8,
        "gradient_clipping": clipping or 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    assert {name: launch.deepspeed[name] for name in wanted} == wanted
    assert "auto" not in json.dumps(launch.deepspeed)
    shown = launch.describe("bfloat16")
    parts = [
        f"ZeRO {launch.zero_stage}",
        config_file.replace("yaml", "json"),
        f"clipping {clipping or 0.0} (optim.max_grad",
    ]
    assert all(part in shown for part in [*parts, "precision bfloat16 (model.dtype"]), shown


@pytest.mark.parametrize("config_file", ZERO)
def test_compilation_is_refused_with_deepspeed_which_would_mix_parameters(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = Config(run=RunConfig(compile=True))
    with pytest.raises(UserError, match=r"run\.compile=true.*DeepSpeed.*run\.compile=false.*ddp\.yaml"):
        read_launch(config, launcher_variables(config_file))
    assert read_launch(config, {}).deepspeed is None


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_opens_with_when_to_use_it(path: Path) -> None:
    assert path.read_text().startswith("# ") and len(path.read_text().split("\ncompute")[0]) > 100


@pytest.mark.parametrize(
    ("deepspeed", "more", "parts"),
    [
        ({"gradient_clipping": 0.5}, {}, ["gradient clipping", "1.0 (optim.max_grad_norm)", "0.5 (gradient_clipping in"]),
        ({"gradient_accumulation_steps": 4}, {}, ["accumulation", "4 (gradient_accumulation_steps in"]),
        ({"train_micro_batch_size_per_gpu": 8}, {}, ["micro-batch", "8 (train_micro_batch_size_per_gpu in"]),
        ({"train_batch_size": 64}, {}, ["batch", "64 (train_batch_size in"]),
        ({"bf16": {"enabled": True}}, {}, ["precision", "float32 (model.dtype", "True (bf16.enabled in"]),
        ({"optimizer": {"type": "Lamb"}}, {}, ["optimizer", "AdamW (optim.*)", "Lamb"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["scheduler", "linear (optim.schedule)", "WarmupLR"]),
        ({}, {"ACCELERATE_GRADIENT_CLIPPING": "3.0"}, ["gradient clipping", "3.0 (accelerate's configuration"]),
        ({}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, ["accumulation", "2 (accelerate's configuration"]),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["precision", "bf16 (accelerate's configuration", "'no'"]),
        ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["ZeRO stage", "2 (", "3 (accelerate's configuration)"]),
    ],
)
def test_a_contradiction_is_a_row_with_both_values(
    tmp_path: Path, deepspeed: dict[str, Any], more: dict[str, str], parts: list[str]
) -> None:
    config = Config(model=ModelConfig(dtype="float32"))
    with pytest.raises(UserError) as refused:
        read_launch(config, environment(tmp_path, deepspeed, **more))
    lines = str(refused.value).splitlines()
    assert all(part in lines[2] for part in parts), lines
    assert len(lines) == 4


def test_all_contradictions_are_in_one_table(tmp_path: Path) -> None:
    given = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 4, "fp16": {"enabled": True}}
    with pytest.raises(UserError) as refused:
        read_launch(Config(), environment(tmp_path, given, ACCELERATE_MIXED_PRECISION="fp16"))
    assert len(str(refused.value).splitlines()) == 2 + 4 + 1


def test_values_that_agree_are_no_contradiction(tmp_path: Path) -> None:
    given = {"gradient_clipping": 1, "gradient_accumulation_steps": "auto", "train_batch_size": 2}
    launch = read_launch(Config(), environment(tmp_path, given, ACCELERATE_GRADIENT_CLIPPING="1.0"))
    assert launch.deepspeed is not None and launch.deepspeed["gradient_accumulation_steps"] == 1


def test_plain_launches_are_checked_too() -> None:
    assert read_launch(Config(), {}).deepspeed is None
    with pytest.raises(UserError, match="bf16"):
        read_launch(Config(), {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "no DeepSpeed configuration"),
        ("{", "not valid JSON"),
        ('{"zero_optimization": {}}', "must be 1, 2 or 3"),
        ("[]", "must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}', "zero_optimization.reduce_bucket_size"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_message(tmp_path: Path, text: str | None, part: str) -> None:
    variables = environment(tmp_path, {})
    path = Path(variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=part):
        read_launch(Config(), variables)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
)
def test_a_launch_of_several_that_would_train_alone_is_refused(variables: dict[str, str]) -> None:
    with pytest.raises(UserError, match="would train alone"):
        refuse_lost_ranks(variables, 1)
    refuse_lost_ranks(variables, 2)
    refuse_lost_ranks({"ACCELERATE_USE_CPU": "False"}, 1)


@pytest.mark.parametrize(
    ("config", "name"),
    [(Config(lora=LoraSettings(dora=True)), "lora.dora"), (Config(model=ModelConfig(quantize="4bit")), "model.quantize")],
)
def test_what_needs_whole_frozen_weights_is_refused_under_stage_3_alone(tmp_path: Path, config: Config, name: str) -> None:
    for stage in (1, 2):
        read_launch(config, environment(tmp_path, {"zero_optimization": {"stage": stage}}))
    read_launch(Config(), environment(tmp_path, {"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match=rf"{name}=.*ZeRO 3.*zero2\.yaml"):
        read_launch(config, environment(tmp_path, {"zero_optimization": {"stage": 3}}))
