"""Which layers get LoRA: known from config.json, the same in PEFT, and refused where nothing matches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from vl_dist.errors import UserError
from vl_dist.model.flops import FlopCounter, ModelShape, read_shape
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.targets import PARTS, choose_targets, describe_targets, linear_layers, lora_size, part_of
from vl_dist.settings import LoraSettings

TOWER = replace(LoraSettings(r=2), tower=True, target_modules=("q_proj", "qkv", "proj", "fc2"))
CHOICES = [
    LoraSettings(r=4),
    replace(TOWER, dora=True),
    replace(TOWER, merger=True, target_modules=r".*layers\.1\..*|.*blocks\.1\..*|.*merger.*"),
    LoraSettings(r=2, target_modules=r".*(q_proj|qkv)"),
    LoraSettings(r=2, merger=True, target_modules=("mlp.2", "1.self_attn.q_proj")),
    LoraSettings(r=2, tower=True, merger=True, target_modules=".*"),
]


@pytest.fixture(scope="module")
def shape(tiny_model: Path) -> ModelShape:
    return read_shape(tiny_model)


def test_the_linear_layers_of_a_config_are_those_of_the_model(tiny_model: Path, shape: ModelShape) -> None:
    base = load_base(tiny_model, torch.float32, "sdpa")
    linears = {name: (m.in_features, m.out_features) for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    del linears["lm_head"]
    assert list(linear_layers(shape).items()) == list(linears.items())


@pytest.mark.parametrize("lora", CHOICES, ids=lambda lora: str(lora.target_modules)[:20])
def test_peft_gets_exactly_the_layers_that_were_chosen_and_their_size_was_known(
    tiny_model: Path, shape: ModelShape, lora: LoraSettings
) -> None:
    model = attach_lora(load_base(tiny_model, torch.float32, "sdpa"), lora, seed=0)
    chosen = choose_targets(lora, linear_layers(shape))
    found = [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    assert sorted(found) == sorted(chosen.names)
    by_part = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        by_part[part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    size = lora_size(shape, lora)
    assert list(by_part.values()) == [size.language, size.tower, size.merger]
    assert size.total == sum(by_part.values()) > 0


def test_names_stay_names_in_the_adapters_own_settings(tiny_model: Path) -> None:
    model = attach_lora(load_base(tiny_model, torch.float32, "sdpa"), LoraSettings(r=2), seed=0)
    assert model.peft_config["default"].target_modules == set(LoraSettings().target_modules)


def test_the_audit_counts_layers_and_parameters_by_part_and_says_what_was_left_out(shape: ModelShape) -> None:
    targets = choose_targets(CHOICES[3], linear_layers(shape))
    text = describe_targets(targets, {"language model": 1234, "tower": 0, "merger": 0})
    assert text == (
        "language model 2 layers, 1,234 parameters; "
        "tower none (2 matching layers left out, as lora.tower is false); merger none"
    )


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        (LoraSettings(target_modules=("q_proj", "query")), ["'query'", "no linear layer", "q_proj", "qkv", "mlp.0"]),
        (LoraSettings(target_modules=("q_proj", "qkv")), ["'qkv'", "only in the tower", "lora.tower=true"]),
        (LoraSettings(target_modules=("mlp.0",)), ["only in the merger", "lora.merger=true"]),
        (LoraSettings(target_modules=("lm_head",)), ["'lm_head'", "no linear layer"]),
        (LoraSettings(target_modules="q_proj"), ["'q_proj'", "regular expression", "self_attn.q_proj", "[q_proj, v_proj]"]),
        (LoraSettings(target_modules=r".*blocks.*"), ["layers only in the tower", "lora.tower=true"]),
        (LoraSettings(tower=True), ["lora.tower is true", "q_proj, k_proj", "no layer there", "fc1, fc2, proj, qkv"]),
        (LoraSettings(merger=True), ["lora.merger is true", "mlp.0, mlp.2"]),
    ],
)
def test_what_matches_nothing_is_refused_with_the_layers_there_are_or_the_key_to_set(
    shape: ModelShape, lora: LoraSettings, parts: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        choose_targets(lora, [*linear_layers(shape), "lm_head"])
    assert all(part in str(refused.value) for part in parts), str(refused.value)


def test_the_2b_has_the_known_adapter_size_and_the_tower_its_own_operations(shape_2b: ModelShape) -> None:
    plain = LoraSettings(r=64)
    assert lora_size(shape_2b, plain).total == 73_859_072
    targets = (*plain.target_modules, "qkv", "proj", "fc1", "fc2")
    frozen, trained = (
        FlopCounter(shape_2b, lora_size(shape_2b, lora))
        for lora in (plain, replace(plain, tower=True, target_modules=targets))
    )
    lora = 6 * 64 * 32 * (1280 + 3 * 1280 + 2 * 1280 + 2 * (1280 + 5120))
    backward = 2 * 32 * (4 * 1280**2 + 2 * 1280 * 5120) + 2 * (5120**2 + 5120 * 1536) / 4
    attention = 8 * 400**2 * 1280 * 32
    assert trained.image(400) - frozen.image(400) == pytest.approx(400 * (lora + backward) + attention, rel=1e-9)
    assert trained.per_token == frozen.per_token


def test_layers_below_everything_that_trains_cost_their_forward_alone(shape_2b: ModelShape) -> None:
    last = LoraSettings(r=64, target_modules=r".*layers\.27\..*_proj")
    counter = FlopCounter(shape_2b, lora_size(shape_2b, last))
    layer = sum(a * b for a, b in shape_2b.linear_sizes.values())
    assert counter.per_token == 27 * 2 * layer + 4 * layer + 6 * lora_size(shape_2b, last).language
    with_merger = replace(last, merger=True, target_modules=r".*layers\.27\..*_proj|.*merger.*")
    assert FlopCounter(shape_2b, lora_size(shape_2b, with_merger)).per_token == counter.per_token + 27 * 2 * layer
