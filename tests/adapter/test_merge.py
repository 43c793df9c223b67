"""Merging: one model that plain transformers loads, with the adapter's logits, whole or not at all."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from tests.adapter.made import export
from vl_dist import cli
from vl_dist.adapter import merge as merging
from vl_dist.adapter.load import load
from vl_dist.adapter.merge import merge
from vl_dist.adapter.probe import distance, next_logits
from vl_dist.errors import UserError


def test_the_merged_model_has_the_adapters_logits_in_plain_transformers(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "merged"
    assert merge(exported, out, base_dir=None, shard_size="200KB").startswith("logits off by")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"} <= names
    assert "chat_template.jinja" in names and not any(name.startswith("adapter") for name in names)
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert not list(out.parent.glob(".writing-*"))

    adapter = load(exported, base_dir=None)
    inputs = adapter.probe_inputs()
    merged, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = next_logits(adapter.model, inputs)
    assert distance(next_logits(merged.eval(), inputs).tolist(), expected.tolist()) < 1e-5
    with adapter.model.disable_adapter():
        base = next_logits(adapter.model, inputs)
    assert distance(base.tolist(), expected.tolist()) > 0.1, "the adapter does nothing: the test shows nothing"
    processor = AutoProcessor.from_pretrained(out)
    assert processor.chat_template == adapter.processor.chat_template
    assert processor.image_processor.size == adapter.processor.image_processor.size
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert set(adapter.encoder.stop_ids) <= set(ends), "generation ends where the adapter was trained to"


def test_a_bfloat16_base_stays_bfloat16_and_its_logits_agree_to_rounding(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    from vl_dist.model.load import load_base, load_processor

    base = tmp_path / "base"
    load_base(tiny_model, torch.bfloat16, "sdpa").save_pretrained(base)
    load_processor(tiny_model).save_pretrained(base)
    adapter, _ = export(base, photos, tmp_path / "run", dtype=torch.bfloat16)
    merge(adapter, tmp_path / "merged", base_dir=None, shard_size="4GB")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    loaded = load(adapter, base_dir=None)
    inputs = loaded.probe_inputs()
    off = distance(next_logits(merged.eval(), inputs).tolist(), next_logits(loaded.model, inputs).tolist())
    assert off < 5e-2


def test_a_merge_that_cannot_be_written_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("kept")
    assert cli.main(["merge", str(exported), str(occupied)]) == 2
    assert "holds files" in capsys.readouterr().err
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="no directory"):
        merge(exported, occupied / "mine.txt", base_dir=None, shard_size="4GB")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(UserError, match=r"needs 0\.1 GiB"):
        merge(exported, tmp_path / "out", base_dir=None, shard_size="4GB")
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        merge(exported, tmp_path / "out", base_dir=None, shard_size="4GB")
    assert {path.name for path in tmp_path.iterdir()} == {"occupied"}


def test_an_adapter_that_does_not_compute_what_it_did_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1}))
    with pytest.raises(UserError, match="does not compute"):
        merge(adapter, tmp_path / "out", base_dir=None, shard_size="4GB")
    assert not (tmp_path / "out").exists()
