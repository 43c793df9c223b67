"""Rows: cut on resume, complete after a kill, and sums over what was trained."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.examples import SEVEN
from vl_dist.data.collate import Collator
from vl_dist.data.groups import group_examples
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData
from vl_dist.data.plan import make_plan
from vl_dist.model.flops import FlopCounter, LoraSize, read_shape
from vl_dist.run.distributed import Ranks
from vl_dist.run.metrics import JsonLines, Meter, Record, read_metrics, scores_of


def test_rows_beyond_the_checkpoint_are_cut_and_half_a_row_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n{"step": 6, "tr')
    JsonLines(path, keep_to_step=2).write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2, 3]


def test_the_scores_of_a_row_are_its_columns_of_an_evaluation(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    rows = [{"step": 0, "eval/loss": 3.0}, {"step": 2, "eval/loss": 1.0, "train/loss": 2.0}, {"step": 3, "train/loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tra')
    assert read_metrics(tmp_path) == rows
    assert [scores_of(row) for row in rows] == [{"eval/loss": 3.0}, {"eval/loss": 1.0}, {}]


def test_a_row_is_the_mean_over_targets_since_the_row_before(collator: Collator, tiny_model: Path) -> None:
    flops = FlopCounter(read_shape(tiny_model), LoraSize(language=9))
    meter = Meter(Ranks(Accelerator(cpu=True)), flops, peak_flops=1e12)
    packs = [collator.pack(SEVEN[:2]), collator.pack(SEVEN[2:3]), collator.pack([])]
    for _ in range(2):
        meter.add(packs, torch.tensor(12.0, dtype=torch.float64), torch.tensor(0.5), data_wait_s=0.25)
    row = meter.row()
    targets = 2 * sum(pack.num_targets for pack in packs)
    assert row["train/target_tokens"] == targets
    assert row["train/loss"] == pytest.approx(24.0 / targets)
    assert (row["train/grad_norm"], row["perf/data_wait_s"]) == (0.5, 0.5)
    tokens = sum(pack.num_tokens for pack in packs)
    assert row["perf/padding"] == pytest.approx(1 / tokens)
    assert row["perf/examples_per_s"] / row["perf/images_per_s"] == pytest.approx(3 / 2)  # three examples, two photos
    assert row["perf/peak_memory_gib"] > 0
    lengths = [collator.pack([example]).num_tokens for example in SEVEN[:3]]
    useful = 2 * (sum(flops.document(0, [n]) for n in lengths) + flops.targets_head(targets // 2))
    useful += 2 * sum(flops.image(int(n)) for pack in packs for n in pack.image_grids.prod(-1))
    seconds = row["train/target_tokens"] / row["perf/target_tokens_per_s"]
    assert row["perf/mfu"] == pytest.approx(useful / seconds / 1e12)
    meter.add(packs[:1], torch.tensor(1.0), torch.tensor(0.1), data_wait_s=0.0)
    assert meter.row()["train/target_tokens"] == packs[0].num_targets


def test_the_ledger_says_after_each_epoch_whether_each_example_was_in_one_step(
    collator: Collator, photos: Path, shape: PatchShape, tmp_path: Path
) -> None:
    lengths = measure(SEVEN, collator.encoder, HeaderReader(photos, collator.budget, shape))
    plan = make_plan(group_examples(lengths), 3, seed=1, shuffle=True, num_epochs=2)
    record = Record(tmp_path, is_main=True, keep_to_step=0, data=LoadedData(SEVEN, lengths, collator), plan=plan)
    steps = list(plan.steps())
    for step in steps[:3]:
        record.ledger(step, [])
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert [row["targets"] for row in rows[:3]] == [int(lengths.targets[step.examples].sum()) for step in steps[:3]]
    assert rows[3] == {"step": 3, "epoch": 0, "examples": 7, "as_planned": 7, "missing": [], "repeated": []}
    # A second epoch in which one step went missing and another came twice.
    for step in (steps[3], steps[3], steps[5]):
        record.ledger(step, [])
    last = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["missing"] == [example.id for n, example in enumerate(SEVEN) if n in steps[4].examples]
    assert sorted(last["repeated"]) == sorted(SEVEN[n].id for n in steps[3].examples)
    assert last["as_planned"] == len(steps[5].examples)
