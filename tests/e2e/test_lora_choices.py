"""A run with DoRA on every part, each with its own rate: it says so, goes on where it stood, and its adapter is used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.commands import read_rows
from tests.processes import run_ranks, train_main
from vl_dist.adapter.check import check_adapter
from vl_dist.adapter.merge import merge
from vl_dist.model.load import load_base
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

TARGETS = r".*language_model\.layers\.[01]\..*_proj|.*visual\.blocks\..*\.(qkv|proj|fc1)|.*merger.*"


def start(home: Path, run: Path, *words: str) -> tuple[int | None, str]:
    log = home / f"{run.name}.log"
    log.unlink(missing_ok=True)
    all_words = [
        f"shapes.dir={home / 'data'}",
        "shapes.num_train=8",
        "shapes.num_eval=1",
        f"model.path={home / 'data' / 'model'}",
        f"data.train={home / 'data' / 'records.jsonl'}",
        f"data.eval={home / 'data' / 'eval.jsonl'}",
        "data.num_workers=0",
        "batch.examples_per_step=8",
        "optim.max_steps=4",
        "optim.schedule=linear",
        "optim.warmup_steps=0",
        "optim.lr=1e-3",
        "optim.lr_tower=2e-3",
        "optim.lr_merger=5e-4",
        "lora.r=4",
        "lora.alpha=6",
        "lora.dora=true",
        "lora.rslora=true",
        "lora.dropout=0.1",
        "lora.tower=true",
        "lora.merger=true",
        f"lora.target_modules={TARGETS}",
        "checkpoint.every_steps=2",
        "log.every_steps=1",
        "eval.max_new_tokens=4",
        f"run.output_dir={run}",
        *words,
    ]
    (code,) = run_ranks(train_main, all_words, world_size=1, log=log)
    return code, log.read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("choices")
    make_shapes(ShapesConfig(dir=home / "data", num_train=8, num_eval=1))
    code, log = start(home, home / "run")
    assert code == 0, log[-3000:]
    return home


def test_the_panel_says_what_matched_by_part_and_rows_hold_each_rate(home: Path) -> None:
    log = " ".join((home / "run.log").read_text().replace("│", " ").split())
    state = load_file(home / "run" / "adapter" / "adapter_model.safetensors")
    sizes = {
        part: sum(t.numel() for n, t in state.items() if part in n) for part in ("language_model", ".blocks.", "merger")
    }
    assert f"LoRA language model 14 layers, {sizes['language_model']:,} parameters; tower 6 layers, " in log
    assert f"{sizes['.blocks.']:,} parameters; merger 2 layers, {sizes['merger']:,} parameters" in log
    assert "rank 4, alpha 6, rsLoRA, DoRA, on" in log
    for row in read_rows(home / "run" / "metrics.jsonl")[1:]:
        rates = (row["train/lr"], row["train/lr_tower"], row["train/lr_merger"])
        assert rates == pytest.approx(tuple(rate * (5 - row["step"]) / 4 for rate in (1e-3, 2e-3, 5e-4)))


def test_a_run_goes_on_to_the_same_weights_and_refuses_other_choices(home: Path) -> None:
    again = home / "again"
    shutil.copytree(home / "run", again, symlinks=True)
    for gone in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(again / gone)
    for word in ("lora.dora=false", "lora.rslora=false", "optim.lr_tower=1e-3", "lora.target_modules=[q_proj,qkv,mlp.0]"):
        code, log = start(home, again, word)
        assert code == 2 and word.split("=")[0] in log, log[-2000:]
    code, log = start(home, again)
    assert code == 0 and "Going on from" in log, log[-3000:]
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (home / "run", again))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_adapter_loads_with_plain_peft_checks_merges_and_says_its_choices(home: Path, tmp_path: Path) -> None:
    adapter = home / "run" / "adapter"
    base = load_base(home / "data" / "model", torch.float32, "sdpa")
    state = PeftModel.from_pretrained(base, str(adapter)).state_dict()
    assert any("visual.merger.mlp.2.lora_magnitude_vector" in name for name in state)
    report = check_adapter(adapter, base_dir=None)
    assert [check.holds for check in report.checks] == [True] * 6 + [False]
    assert report.faults == [
        "vLLM cannot serve this adapter: it is DoRA, which vLLM does not load. python -m vl_dist merge makes a model that "
        "it serves without LoRA."
    ]
    assert merge(adapter, tmp_path / "merged", base_dir=None, shard_size="4GB").startswith("logits off by")
    metadata = json.loads((adapter / "training_metadata.json").read_text())
    chosen = metadata["lora"]
    assert (chosen["dora"], chosen["rslora"], chosen["tower"], chosen["merger"], chosen["lr_tower"]) == (*[True] * 4, 2e-3)
    assert chosen["target_modules"] == TARGETS and metadata["quantize"] is None
    assert set(metadata["key_style"].split(", ")) == {
        "base_model.model.model.language_model", "base_model.model.model.visual"
    }  # fmt: skip
    card = (adapter / "README.md").read_text()
    assert "rsLoRA, DoRA" in card and "0.002 in the tower, 0.0005 in the merger" in card
