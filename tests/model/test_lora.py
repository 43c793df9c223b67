"""LoRA on the base: which layers, which first weights, exact gradients, and an adapter that any PEFT program reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional

from tests.examples import SEVEN, assert_close, gradients, packed_model
from vl_dist.data.collate import Collator
from vl_dist.errors import UserError
from vl_dist.model.load import load_base
from vl_dist.model.lora import adapter_state, attach_lora, load_adapter_weights
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import LoraSettings

EVERYWHERE = LoraSettings(
    r=4, alpha=8, dropout=0.0, tower=True, merger=True,
    target_modules=("q_proj", "down_proj", "qkv", "proj", "fc1", "fc2", "mlp.0", "mlp.2"),
)  # fmt: skip


def test_the_saved_adapter_loads_with_plain_peft_and_gives_the_same_logits(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model = packed_model(tiny_model).eval()
    save_adapter(model.peft_model, tmp_path)
    loaded = PeftModel.from_pretrained(load_base(tiny_model, torch.float32, "sdpa"), tmp_path)
    again = PackedModel(loaded, "sdpa").eval()
    batch = collator.pack(SEVEN)
    with torch.no_grad():
        assert torch.equal(model.target_logits(batch), again.target_logits(batch))
        with model.peft_model.disable_adapter():
            assert not torch.allclose(model.target_logits(batch), again.target_logits(batch), atol=1e-2)


def test_lora_goes_to_the_language_model_in_float32_and_everything_else_is_frozen(tiny_model: Path) -> None:
    base = load_base(tiny_model, torch.bfloat16, "sdpa")
    model = PackedModel(attach_lora(base, LoraSettings(r=4), seed=0), "sdpa")
    names = model.lora_parameters
    assert len(names) == 2 * 7 * 2  # layers x targets x (A, B)
    assert all("language_model.layers" in name for name in names)
    assert {p.dtype for p in names.values()} == {torch.float32}
    assert model.base_dtype == torch.bfloat16
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)


def test_the_same_seed_makes_the_same_adapter(tiny_model: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = attach_lora(load_base(tiny_model, torch.float32, "sdpa"), LoraSettings(r=4), seed=seed)
        return torch.cat([tensor.flatten() for tensor in adapter_state(model).values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_target_that_no_layer_has_is_refused_with_the_names_there_are(tiny_model: Path) -> None:
    base = load_base(tiny_model, torch.float32, "sdpa")
    with pytest.raises(UserError, match=r"'query'.*q_proj"):
        attach_lora(base, LoraSettings(target_modules=("q_proj", "query")), seed=0)


def test_starting_weights_must_fit_in_layers_and_in_rank(tiny_model: Path, tmp_path: Path) -> None:
    model = packed_model(tiny_model)
    save_adapter(model.peft_model, tmp_path / "a")
    fresh = attach_lora(load_base(tiny_model, torch.float32, "sdpa"), LoraSettings(r=4, alpha=8), seed=9)
    load_adapter_weights(fresh, tmp_path / "a")
    saved = adapter_state(model.peft_model)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter_state(fresh).items())
    for settings, reason in [
        (LoraSettings(r=2), r"lora\.r"),
        (LoraSettings(r=4, target_modules=("q_proj",)), "other layers"),
        (LoraSettings(r=4, init_from=tmp_path / "absent"), "holds no adapter"),
    ]:
        settings = settings if settings.init_from else LoraSettings(
            r=settings.r, target_modules=settings.target_modules, init_from=tmp_path / "a"
        )  # fmt: skip
        with pytest.raises(UserError, match=reason):
            attach_lora(load_base(tiny_model, torch.float32, "sdpa"), settings, seed=0)


def test_renamed_keys_are_refused_and_never_the_base_in_disguise(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = packed_model(tiny_model)
    save_adapter(model.peft_model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({"module." + name: tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match="other layers"):
        load_adapter_weights(model.peft_model, tmp_path)


@pytest.mark.parametrize(
    "lora",
    [
        EVERYWHERE,
        replace(EVERYWHERE, dora=True),
        replace(EVERYWHERE, rslora=True, target_modules=r".*(v_proj|up_proj|qkv|mlp\.2)"),
        replace(EVERYWHERE, tower=False, target_modules=("mlp.0",)),
    ],
    ids=["all parts", "DoRA", "rsLoRA by expression", "merger alone"],
)
def test_the_gradient_is_that_of_the_models_own_forward(tiny_model: Path, collator: Collator, lora: LoraSettings) -> None:
    model = packed_model(tiny_model, lora=lora)
    chosen = [SEVEN[0], SEVEN[1], SEVEN[3]]
    whole = model.peft_model.get_base_model()
    for batch in (collator.pack([example]) for example in chosen):
        kinds = torch.zeros_like(batch.input_ids).index_fill(0, batch.image_rows, 1)
        images = {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grids} if batch.num_images else {}
        mask = torch.ones_like(batch.input_ids)[None]
        output = whole(input_ids=batch.input_ids[None], attention_mask=mask, mm_token_type_ids=kinds[None], **images)
        loss = functional.cross_entropy(output.logits[0, batch.target_rows], batch.target_ids, reduction="sum")
        if loss.requires_grad:  # text alone does not reach the merger
            loss.backward()
    wanted = gradients(model)
    model(collator.pack(chosen)).backward()
    assert_close(gradients(model), wanted)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    model = packed_model(tiny_model, lora=LoraSettings(r=4, alpha=8, rslora=True)).peft_model
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 4.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_first_weights_are_random_on_both_sides_and_change_nothing_yet(
    tiny_model: Path, dtype: torch.dtype
) -> None:
    lora = LoraSettings(r=4, init_lora_weights="orthogonal")
    state = adapter_state(attach_lora(load_base(tiny_model, dtype, "sdpa"), lora, seed=0))
    for name in (name for name in state if ".lora_A." in name):
        a, b = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        assert a.dtype == b.dtype == torch.float32
        assert (b @ a).abs().max() < 1e-6 < 1e-2 < min(a.abs().max(), b.abs().max())


def test_gaussian_first_weights_are_normal_and_others_are_not(tiny_model: Path) -> None:
    def largest(lora: LoraSettings) -> float:
        state = adapter_state(attach_lora(load_base(tiny_model, torch.float32, "sdpa"), lora, seed=0))
        return max(float(tensor.abs().max()) for name, tensor in state.items() if ".lora_A." in name)

    gaussian, default = (largest(LoraSettings(r=4, init_lora_weights=name)) for name in ("gaussian", "default"))
    assert default < 0.2 < 3 / 4 < gaussian  # uniform within 1 / sqrt(64); normal with deviation 1 / r


@pytest.mark.parametrize(
    ("made", "asked", "reason"),
    [
        ({"dora": True}, {}, r"is DoRA\. Set lora\.dora=true"),
        ({}, {"dora": True}, r"is not DoRA\. Set lora\.dora=false"),
        ({"rslora": True}, {}, r"lora\.alpha=8 lora\.rslora=true"),
        ({"alpha": 8.5}, {}, r"lora\.alpha=8\.5 lora\.rslora=false"),
    ],
)
def test_starting_weights_of_another_kind_or_scale_are_refused_with_the_keys_to_set(
    tiny_model: Path, tmp_path: Path, made: dict[str, Any], asked: dict[str, Any], reason: str
) -> None:
    plain = LoraSettings(r=4, alpha=8)
    save_adapter(packed_model(tiny_model, lora=replace(plain, **made)).peft_model, tmp_path)
    settings = replace(plain, init_from=tmp_path, **asked)
    with pytest.raises(UserError, match=reason):
        attach_lora(load_base(tiny_model, torch.float32, "sdpa"), settings, seed=0)
    right = replace(plain, init_from=tmp_path, **made)
    attach_lora(load_base(tiny_model, torch.float32, "sdpa"), right, seed=0)


def test_starting_weights_with_layers_scaled_by_themselves_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(packed_model(tiny_model).peft_model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"q_proj": 1}}))
    with pytest.raises(UserError, match="alpha_pattern"):
        attach_lora(load_base(tiny_model, torch.float32, "sdpa"), LoraSettings(r=4, alpha=8, init_from=tmp_path), seed=0)
