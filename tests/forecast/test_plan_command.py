"""`plan`: what it says of the steps is what training does with them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.real_shape import config_2b
from tests.commands import ROOT
from vl_dist.cli import main
from vl_dist.data.groups import group_examples
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import make_plan
from vl_dist.forecast.forecast import _memory
from vl_dist.forecast.memory import PackSize, Training, predict_memory
from vl_dist.forecast.steps import histogram, measure_steps
from vl_dist.model.flops import FlopCounter, read_shape
from vl_dist.model.targets import lora_size
from vl_dist.settings import LoraSettings


@pytest.fixture(scope="module")
def flops(tmp_path_factory: pytest.TempPathFactory) -> FlopCounter:
    directory: Path = tmp_path_factory.mktemp("2b")
    config_2b().save_pretrained(directory)
    shape = read_shape(directory)
    return FlopCounter(shape, lora_size(shape, LoraSettings(r=64, target_modules=("q_proj",))))


def test_figures_are_sums_over_the_packs_that_training_would_get(flops: FlopCounter) -> None:
    rows = [(130, 15, 400, 1, 114)] * 6 + [(60, 20, 0, 0, 39)] * 2
    lengths = Lengths.of_rows(rows)
    plan = make_plan(group_examples(lengths), 4, seed=0, shuffle=False, num_epochs=3)
    found = measure_steps(plan, lengths, flops, world_size=2, max_tokens=300, num_pack_lengths=None)
    assert (found.num_measured, plan.num_steps) == (2, 6)
    assert found.tokens == (4 * 130 + 2 * 130 + 2 * 60) / 2
    assert found.targets == (4 * 15 + 2 * 15 + 2 * 20) / 2
    assert (found.images, found.packs_per_rank, found.fillers, found.padding) == (3, 1, 0, 0)
    assert found.fill == pytest.approx(found.tokens / 600)
    assert (found.largest.tokens, found.largest.targets, found.largest.patches) == (260, 35, 800)
    assert found.skew == pytest.approx(1.0) and found.worst_skew == pytest.approx(1.0)
    one_image = flops.document(0, [130]) + flops.image(400) + flops.targets_head(15)
    text = flops.document(0, [60]) + flops.targets_head(20)
    assert found.flops == pytest.approx((6 * one_image + 2 * text) / 2)
    padded = measure_steps(plan, lengths, flops, world_size=2, max_tokens=300, num_pack_lengths=1)
    assert padded.padding == pytest.approx(1 - found.tokens / 600) and padded.largest.tokens == 300


def test_a_shared_prompt_counts_its_trunk_and_images_once(flops: FlopCounter) -> None:
    rows = [(130, 15, 400, 1, 114)] * 5
    alone = Lengths.of_rows(rows)
    shared = replace(alone, group=np.zeros(5, dtype=np.int64))
    found = {}
    for name, lengths in (("alone", alone), ("shared", shared)):
        plan = make_plan(group_examples(lengths), 5, seed=0, shuffle=True, num_epochs=1)
        found[name] = measure_steps(plan, lengths, flops, world_size=1, max_tokens=1000, num_pack_lengths=None)
    assert (found["alone"].tokens, found["shared"].tokens) == (650, 114 + 5 * 16)
    assert (found["alone"].images, found["shared"].images) == (5, 1)
    assert found["alone"].targets == found["shared"].targets
    expected = flops.document(114, [16] * 5) + flops.image(400) + flops.targets_head(75)
    assert found["shared"].flops == pytest.approx(expected)


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=200), st.integers(1, 20))
def test_a_histogram_counts_each_value_once_in_few_bins_of_a_round_width(values: list[int], most: int) -> None:
    bins = histogram(np.array(values), most)
    assert sum(count for _, _, count in bins) == len(values)
    assert len(bins) <= most + 1
    widths = {high - low + 1 for low, high, _ in bins}
    assert len(widths) == 1 and str(widths.pop()).rstrip("0") in ("1", "2", "5")
    for low, high, count in bins:
        assert count == sum(low <= value <= high for value in values)


def test_the_command_needs_no_weights_and_prints_all_tables(
    tmp_path: Path, tiny_model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    content = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "COCO Yes:"}]
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": content}], "answers": ["A cat.", "A cat on a table."]}
        for n in range(9)
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.path={model}", f"data.train={tmp_path / 'records.jsonl'}", f"data.image_root={photos}"]
    words += ["data.max_pixels=20000", "data.share_prefix=true", "batch.examples_per_step=4", "shapes=null"]
    assert main(["plan", str(ROOT / "recipes" / "coco2014_tutorial.yaml"), "data.eval=last:1", "--gpus", "2", *words]) == 2
    assert "data.resized_height" in capsys.readouterr().err
    words += ["data.resized_height=null", "data.resized_width=null", "data.eval=last:1"]
    assert main(["plan", str(ROOT / "recipes" / "coco2014_tutorial.yaml"), "--gpus", "2", *words]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "plan on 2 GPUs",
        "examples 16 in 4 groups",
        "steps 8 of 4 examples; 4 an epoch",
        "pack fill",
        "rank skew",
        "useful operations",
        "tokens of an example",
        "MiB on one GPU",
        "data parallel",
        "ZeRO 3",
        "one checkpoint",
        "image features",
    ):
        assert part in shown, (part, shown)
    recipe = str(ROOT / "recipes" / "coco2014_tutorial.yaml")
    assert re.search(r"of them the tower \d+%, in every epoch", shown) and "if they are cached" in shown
    assert main(["plan", recipe, *words, "model.feature_cache=kept"]) == 0
    cached = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "until model.feature_cache has all images" in cached and "image features, in kept" in cached
    fast = str(ROOT / "recipes" / "coco2014_fast.yaml")
    assert main(["plan", fast, *words, "data.shuffle=false"]) == 0
    planned = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"examples 16 in \d groups", planned) and "image features, in data/features" in planned
    assert main(["plan", recipe, *words, "lora.target_modules=[q_proj,qkv]"]) == 2
    assert "lora.tower=true" in capsys.readouterr().err
    assert main(["plan", recipe, *words, "lora.target_modules=[q_proj,qkv]", "lora.tower=true"]) == 0
    assert "memory of activations in the tower" in " ".join(capsys.readouterr().out.split())


def test_memory_of_the_adapter_is_that_of_the_layers_that_train(flops: FlopCounter) -> None:
    shape, pack = flops.shape, PackSize(tokens=512, targets=64, patches=400)
    training = Training(rank=8, targets=("q_proj",), has_dropout=False, base_bytes=2)
    plain = _memory(shape, training, lora_size(shape, LoraSettings(r=8, target_modules=("q_proj",))), pack,
                    world_size=4, zero_stage=2)  # fmt: skip
    wanted = predict_memory(shape, training, pack, world_size=4, zero_stage=2)
    assert plain == replace(wanted, lora=pytest.approx(wanted.lora))
    tower = lora_size(shape, LoraSettings(r=8, target_modules=("qkv",), tower=True))
    none = replace(training, targets=())
    assert _memory(shape, none, tower, pack, world_size=1, zero_stage=0).lora == pytest.approx(16 * tower.total)


def test_a_number_of_gpus_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "0"]) == 2
    assert "--gpus" in capsys.readouterr().err


def test_the_step_figures_need_no_torch() -> None:
    code = "import sys, vl_dist.forecast.steps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_how_often_an_epoch_has_each_file_and_why_zero_3_needs_more_on_one_gpu(
    tmp_path: Path, tiny_model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "COCO Yes:"}]
    for name, count in (("a", 6), ("b", 4)):
        rows = [
            {"id": f"{name}{n}", "messages": [{"role": "user", "content": content}], "answers": ["A cat."]}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"data.train=[{tmp_path}/a.jsonl,{{path: {tmp_path}/b.jsonl, weight: 2.5}}]"
    words = [f"model.path={tiny_model}", files, f"data.image_root={photos}", "data.max_pixels=20000", "data.eval=null"]
    words += ["batch.examples_per_step=4", "shapes=null", "optim.num_epochs=1", "optim.max_steps=null"]
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    joined = " ".join(shown.replace("│", " ").split())
    assert "6 x 1" in joined and "4 x 2.5" in joined
    assert "steps 4 of 4 examples; 4 an epoch" in joined  # of 6 and 10 examples
    assert "ZeRO 3 needs more than data parallel here" in joined
    assert max(map(len, shown.splitlines())) <= 80
