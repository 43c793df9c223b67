"""Loading: which precision, which layers, and an adapter that any PEFT program reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.examples import SEVEN, packed_model
from vl_dist.data.collate import Collator
from vl_dist.errors import UserError
from vl_dist.model.load import load_base, load_processor, patch_shape, resolve_dtype
from vl_dist.model.lora import adapter_state, attach_lora, load_adapter_weights
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import LoraSettings


@pytest.mark.parametrize(
    ("setting", "device", "bf16", "expected"),
    [
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cpu", True, torch.float32),
        ("bfloat16", "cpu", True, torch.bfloat16),
        ("float32", "cuda", False, torch.float32),
    ],
)
def test_precision_follows_the_device_unless_it_is_set(
    setting: Any, device: str, bf16: bool, expected: torch.dtype
) -> None:
    assert resolve_dtype(setting, device, bf16_supported=bf16) == expected


@pytest.mark.parametrize("setting", ["auto", "bfloat16"])
def test_a_gpu_without_bfloat16_is_told_so_and_given_the_alternative(setting: Any) -> None:
    with pytest.raises(UserError, match=r"no bfloat16.*model\.dtype=float32"):
        resolve_dtype(setting, "cuda", bf16_supported=False)


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
    ("change", "reason"),
    [
        ({"model_type": "llama"}, "only qwen2_vl"),
        ({"vision_config": {"patch_size": 16}}, "cannot match"),
        ({"vision_config": {"spatial_merge_size": 4}}, "cannot match"),
    ],
)
def test_files_of_different_models_are_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        patch_shape(tmp_path / "model", load_processor(tmp_path / "model"))


def test_missing_processor_files_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(UserError, match="processor files"):
        load_processor(tmp_path)
