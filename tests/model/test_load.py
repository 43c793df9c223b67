"""Loading the base: which precision, files that belong together, and a base in 4 bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from vl_dist.errors import UserError
from vl_dist.model.flops import read_shape
from vl_dist.model.load import four_bits, load_base, load_processor, patch_shape, refuse_quantize, resolve_dtype
from vl_dist.model.targets import linear_layers, part_of


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


def test_4_bits_are_refused_without_cuda_and_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"needs a CUDA device, but this run is on cpu\. Set model\.quantize=null"):
        refuse_quantize(torch.device("cpu"))
    monkeypatch.setattr("vl_dist.model.load.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        refuse_quantize(torch.device("cuda"))
    monkeypatch.setattr("vl_dist.model.load.find_spec", lambda name: object())
    refuse_quantize(torch.device("cuda"))


def test_a_base_in_4_bits_is_asked_for_as_nf4_on_its_device_and_a_whole_one_is_not(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Qwen2VLForConditionalGeneration.from_pretrained
    asked: list[dict[str, Any]] = []

    def stand_in(directory: Path, **settings: Any) -> Any:
        asked.append(settings)
        return own(
            directory, **{name: v for name, v in settings.items() if name not in ("quantization_config", "device_map")}
        )

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "from_pretrained", stand_in)
    load_base(tiny_model, torch.float32, "sdpa", four_bits_on=torch.device("cuda", 1))
    load_base(tiny_model, torch.float32, "sdpa")
    found, whole = asked
    assert found["device_map"] == {"": torch.device("cuda", 1)}
    made = found["quantization_config"]
    assert made.quantization_method() == "nf4" and made.bnb_4bit_use_double_quant
    assert made.bnb_4bit_compute_dtype == found["dtype"] == torch.float32
    assert not {"quantization_config", "device_map"} & whole.keys()


def test_in_4_bits_are_the_language_models_layers_and_no_others(tiny_model: Path) -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    skipped = four_bits(torch.bfloat16).llm_int8_skip_modules
    for name in (*linear_layers(read_shape(tiny_model)), "lm_head"):
        in_4_bits = part_of(name) == "language model" and name != "lm_head"
        assert utils.should_convert_module(name, skipped) == in_4_bits, name
