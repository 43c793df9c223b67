"""Recomputation gives the same numbers, with the same dropout, and runs again what it was told to and nothing else."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.examples import SEVEN, gradients, packed_model
from vl_dist.data.collate import Collator
from vl_dist.model.attention import Backend
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.recomputed import is_recompute, recomputed_layers
from vl_dist.settings import LoraSettings

WAYS = ("none", "all", "every_2")


def with_trained_tower(directory: Path, recompute: str) -> PackedModel:
    settings = LoraSettings(r=2, dropout=0.1, target_modules=("q_proj", "down_proj", "qkv", "fc1"), tower=True)
    adapted = attach_lora(load_base(directory, torch.float32, "sdpa"), settings, seed=0)
    model = PackedModel(adapted, "sdpa", recompute=recompute).train()
    with torch.no_grad():
        for n, parameter in enumerate(model.lora_parameters.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.2)
    return model


def passes(model: PackedModel) -> Counter[str]:
    """How often each decoder layer and block of the tower is run from now on."""
    found: Counter[str] = Counter()
    base = model.peft_model.get_base_model()
    for kind, layers in (("layer", base.model.language_model.layers), ("block", base.model.visual.blocks)):
        for n, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(lambda *_, name=f"{kind} {n}": found.update([name]))
    return found


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", [False, True])
def test_loss_and_gradients_are_the_same_to_the_bit_with_dropout(
    tiny_model: Path, collator: Collator, backend: Backend, tower: bool
) -> None:
    found = {}
    for way in WAYS:
        if tower:
            model = with_trained_tower(tiny_model, way)
        else:
            model = packed_model(tiny_model, backend, dropout=0.1, recompute=way)
        torch.manual_seed(5)
        loss = model(collator.pack(SEVEN))
        loss.backward()
        after = torch.rand(1)  # the next step's dropout is the same too
        found[way] = {"loss": loss.detach(), "after": after} | gradients(model)
    for way in ("all", "every_2"):
        assert all(torch.equal(tensor, found["none"][name]) for name, tensor in found[way].items())


@pytest.mark.parametrize(
    ("way", "tower", "twice"),
    [
        ("none", True, ()),
        ("all", False, ("layer 0", "layer 1")),
        ("every_2", False, ("layer 0",)),
        ("all", True, ("layer 0", "layer 1", "block 0", "block 1")),
        ("every_2", True, ("layer 0", "block 0")),
    ],
)
def test_chosen_layers_run_twice_and_a_frozen_tower_once(
    tiny_model: Path, collator: Collator, way: str, tower: bool, twice: tuple[str, ...]
) -> None:
    model = with_trained_tower(tiny_model, way) if tower else packed_model(tiny_model, recompute=way)
    found = passes(model)
    model(collator.pack(SEVEN)).backward()
    names = ("layer 0", "layer 1", "block 0", "block 1")
    assert found == {name: 2 if name in twice else 1 for name in names}
    found.clear()
    with torch.no_grad():
        model(collator.pack(SEVEN))
    assert found == dict.fromkeys(names, 1)


def test_names_of_weights_stay(tiny_model: Path) -> None:
    assert packed_model(tiny_model, recompute="all").state_dict().keys() == packed_model(tiny_model).state_dict().keys()


def test_every_n_is_the_first_layer_of_each_n() -> None:
    assert [list(recomputed_layers(way, 7)) for way in ("none", "all", "every_3")] == [[], list(range(7)), [0, 3, 6]]
    assert all(is_recompute(way) for way in (*WAYS, "every_10"))
    assert not any(is_recompute(way) for way in ("some", "every_n", "every_0", "every_1", "every_02", "every_2 ", ""))
