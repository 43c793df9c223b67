"""The contract: an adapter is used as it was trained, or refused with one message."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapter.made import PROMPT, asking, export, trained_on
from tests.examples import packed_model
from vl_dist import cli
from vl_dist.adapter.base_files import fingerprint
from vl_dist.adapter.contract import read_contract
from vl_dist.adapter.load import STEPS, choose_budget, choose_prompt, load, refuse_other_prompt
from vl_dist.adapter.probe import compare, distance, drawing, next_logits, probe_inputs, take_probe
from vl_dist.data.images import PixelBudget
from vl_dist.data.records import ImagePart, Message, TextPart
from vl_dist.errors import UserError
from vl_dist.model.load import load_processor
from vl_dist.model.lora import adapter_state
from vl_dist.run.checkpoint import save_adapter
from vl_dist.tiny import make_tiny_model

WEIGHTS = "adapter_model.safetensors"


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def accept_changed_files(adapter: Path) -> None:
    """As if the adapter had been exported like this, so that what comes after the hashes is what refuses it."""
    change_json(adapter / "training_metadata.json", lambda found: found["files"].pop(WEIGHTS))


def change_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    accept_changed_files(adapter)


def test_a_whole_adapter_passes_every_step_in_order_and_computes_what_was_exported(
    exported: Path, tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    passed: list[str] = []
    loaded = load(exported, base_dir=None, on_step=lambda step, _: passed.append(step))
    assert tuple(passed) == STEPS
    _, model = export(tiny_model, photos, tmp_path / "again")
    inputs = loaded.probe_inputs()
    with torch.no_grad():
        assert torch.equal(next_logits(loaded.model, inputs), next_logits(model.peft_model.eval(), inputs))


def test_exporting_leaves_the_model_its_own_weights_and_probes_those_of_the_files(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    from tests.examples import packed_model
    from vl_dist.run.best import Final
    from vl_dist.run.export import export_adapter
    from vl_dist.settings import Config, ModelConfig, RunConfig

    best, last = packed_model(tiny_model, seed=5), packed_model(tiny_model, seed=6)
    save_adapter(best.peft_model, tmp_path / "best")
    config = Config(model=ModelConfig(path=str(tiny_model)), run=RunConfig(output_dir=tmp_path))
    before = {name: tensor.clone() for name, tensor in adapter_state(last.peft_model).items()}
    data = trained_on(tiny_model, photos)
    final = Final(tmp_path / "best", 3, {})
    adapter = export_adapter(last.peft_model, {}, load_processor(tiny_model), config, data=data, final=final)
    assert last.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(last.peft_model).items())
    loaded = load(adapter, base_dir=None)  # its probe is the best one's, or this would be refused
    assert all(torch.equal(t, adapter_state(best.peft_model)[n]) for n, t in adapter_state(loaded.model).items())


def test_what_a_probe_records_is_what_the_model_computes_with_and_without_the_adapter(
    exported: Path, tiny_model: Path
) -> None:
    contract = read_contract(exported)
    loaded = load(exported, base_dir=tiny_model)
    logits = next_logits(loaded.model, loaded.probe_inputs())
    assert distance(logits[list(contract.probe.token_ids)].tolist(), contract.probe.adapter) < 1e-5
    with loaded.model.disable_adapter():
        logits = next_logits(loaded.model, loaded.probe_inputs())
    assert distance(logits[list(contract.probe.token_ids)].tolist(), contract.probe.base) < 1e-5
    assert distance(contract.probe.adapter, contract.probe.base) > 0.1
    assert int(logits.argmax()) in contract.probe.token_ids


def test_the_probe_has_a_drawing_for_each_image_of_the_prompt_or_none(exported: Path) -> None:
    loaded = load(exported, base_dir=None)
    two = (Message("user", (ImagePart("a"), ImagePart("b"), TextPart("Both."))),)
    text = (Message("user", (TextPart("No image."),)),)
    processor = loaded.processor.image_processor
    budget = loaded.contract.budget
    inputs = probe_inputs(loaded.encoder, processor, two, budget, loaded.shape, pad_id=0)
    assert len(inputs["image_grid_thw"]) == 2
    assert "pixel_values" not in probe_inputs(loaded.encoder, processor, text, budget, loaded.shape, pad_id=0)
    assert drawing(0).tobytes() != drawing(1).tobytes()
    for prompt in (two, text):
        taken = take_probe(loaded.model, probe_inputs(loaded.encoder, processor, prompt, budget, loaded.shape, pad_id=0))
        assert taken.differs
        assert compare(taken, taken.probe).startswith("off by 0")


def test_a_bfloat16_adapter_is_known_again_in_float32(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    adapter, _ = export(tiny_model, photos, tmp_path, dtype=torch.bfloat16)
    assert read_contract(adapter).probe.dtype == "bfloat16"
    for dtype in (torch.bfloat16, torch.float32):
        load(adapter, base_dir=None, dtype=dtype)


def remove_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(weights.items())[1:])


def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("language_model.", "text_model."): tensor for name, tensor in weights.items()}


def zero_b(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in weights.items()}


def double(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 2 for name, tensor in weights.items()}


def half_rank(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: (t[:2] if "lora_A" in n else t[:, :2]).contiguous() for n, t in weights.items()}


def not_a_number(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * float("nan") for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove_one, "do not meet"),
        (rename, "do not meet"),
        (zero_b, "base in disguise"),
        (double, "The adapter does not compute what it did"),
        (half_rank, "does not go onto"),
        (not_a_number, "no numbers"),
    ],
)
def test_other_weights_are_refused_and_never_the_base_in_disguise(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], reason: str
) -> None:
    change_weights(adapter, change)
    with pytest.raises(UserError, match=reason):
        load(adapter, base_dir=None)


def test_a_configuration_that_scales_the_weights_otherwise_is_refused_by_the_probe(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", lambda found: found.update(base_model_name_or_path="me/mine"))
    load(adapter, base_dir=None)
    change_json(adapter / "adapter_config.json", lambda found: found.update(lora_alpha=16))
    with pytest.raises(UserError, match="The adapter does not compute what it did"):
        load(adapter, base_dir=None)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_is_missing_or_changed_is_named(adapter: Path, name: str, gone: bool) -> None:
    if gone:
        (adapter / name).unlink()
    else:
        data = bytearray((adapter / name).read_bytes())
        data[-1] ^= 1
        (adapter / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is {'missing' if gone else 'not the file'}"):
        load(adapter, base_dir=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found.pop("probe"), "is damaged"),
        (lambda found: found["probe"].pop("base"), "is damaged"),
        (lambda found: found.update(format=1), r"format 1.*start the\s+finished run"),
        (lambda found: found.update(template_hash="0"), "chat template"),
        (lambda found: found["base_model"].update(path="/absent"), "--base DIRECTORY"),
    ],
)
def test_metadata_that_cannot_be_kept_is_one_message(
    adapter: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    change_json(adapter / "training_metadata.json", change)
    with pytest.raises(UserError, match=reason):
        load(adapter, base_dir=None)


def test_another_base_is_refused_and_a_copy_of_the_base_is_not(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    from tests.conftest import SMALL, TEXTS

    make_tiny_model(tmp_path / "other", TEXTS, seed=8, size=SMALL)
    with pytest.raises(UserError, match="is not the one that the adapter was trained on"):
        load(adapter, base_dir=tmp_path / "other")
    # A base that has the same names and beginnings is still told by what it computes.
    change_json(
        adapter / "training_metadata.json", lambda found: found.update(base_fingerprint=fingerprint(tmp_path / "other"))
    )
    with pytest.raises(UserError, match="The base model does not compute"):
        load(adapter, base_dir=tmp_path / "other")
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    change_json(copy / "config.json", lambda found: found.update(transformers_version="1.0"))
    assert fingerprint(copy) == fingerprint(tiny_model)
    change_json(copy / "config.json", lambda found: found["text_config"].update(rms_norm_eps=1e-3))
    assert fingerprint(copy) != fingerprint(tiny_model)


def test_other_pixels_or_another_prompt_need_a_flag(exported: Path) -> None:
    contract = read_contract(exported)
    assert choose_budget(contract, PixelBudget(), allow_other=False) == contract.budget
    assert choose_budget(contract, contract.budget, allow_other=False) == contract.budget
    other = PixelBudget(resized_height=56, resized_width=56)
    with pytest.raises(UserError, match=r"max pixels 9,408.*56x56.*--allow-other-pixels"):
        choose_budget(contract, other, allow_other=False)
    assert choose_budget(contract, other, allow_other=True) == other
    for wrong in (PixelBudget(resized_height=56), PixelBudget(max_pixels=0), PixelBudget(min_pixels=9, max_pixels=8)):
        with pytest.raises(UserError):
            choose_budget(contract, wrong, allow_other=True)
    assert choose_prompt(contract, PROMPT, allow_other=False) == contract.prompt
    with pytest.raises(UserError, match=r"COCO Yes:.*What\?.*--allow-other-prompt"):
        choose_prompt(contract, "What?", allow_other=False)
    assert choose_prompt(contract, "What?", allow_other=True) == asking("IMAGE", "What?")
    refuse_other_prompt(contract, asking("some/path.jpg"), "record", allow_other=False)
    refuse_other_prompt(replace(contract, prompt_share=0.9), asking("a.jpg", "What?"), "record", allow_other=False)


def test_the_processor_files_bound_images_as_training_did(exported: Path, photos: Path) -> None:
    """What vLLM and AutoProcessor do with an image, without knowing of training_metadata.json."""
    from PIL import Image

    loaded = load(exported, base_dir=None)
    collator = loaded.collator([photos])
    for example in trained_on(loaded.base_dir, photos).examples:
        _, pixels = collator.prompt(example)
        with Image.open(photos / example.image_paths[0]) as image:
            theirs = loaded.processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        assert theirs.shape == pixels.shape
        assert (theirs - pixels).abs().mean() < 0.02, "only the resampling's rounding may differ"


def test_an_adapter_of_a_base_in_4_bits_is_used_on_the_whole_one_and_says_so(
    adapter: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def perturb(found: dict[str, Any]) -> None:
        found["probe"]["base"] = [0.8 * logit for logit in found["probe"]["base"]]
        found["probe"]["adapter"] = [1.2 * logit for logit in found["probe"]["adapter"]]

    change_json(adapter / "training_metadata.json", perturb)
    with pytest.raises(UserError, match="does not compute what it did"):
        load(adapter, base_dir=None)
    change_json(adapter / "training_metadata.json", lambda found: found.update(quantize="4bit"))
    change_json(adapter / "training_metadata.json", lambda found: found["probe"].update(dtype="4bit"))
    steps: dict[str, str] = {}
    load(adapter, base_dir=None, on_step=steps.__setitem__)
    assert "training had the base in 4 bits" in steps["base model"] and "against 4bit" in steps["probe"]
    assert cli.main(["predict", str(adapter), str(photos / "cat.jpg")]) == 0
    out, err = capsys.readouterr()
    assert "4 bits" in err and "4 bits" not in out


def test_a_probe_taken_on_a_base_in_4_bits_says_so(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    model = packed_model(tiny_model).peft_model
    exported, _ = export(tiny_model, photos, tmp_path)
    inputs = load(exported, base_dir=None).probe_inputs()
    assert take_probe(model, inputs).probe.dtype == "float32"
    model.get_base_model().is_loaded_in_4bit = True
    assert take_probe(model, inputs).probe.dtype == "4bit"
