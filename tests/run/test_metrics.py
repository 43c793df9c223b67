"""Rows: cut on resume, complete after a kill, and sums over what was trained."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.examples import SEVEN
from vl_dist.data.collate import Collator
from vl_dist.run.distributed import Ranks
from vl_dist.run.metrics import JsonLines, Meter, last_scores


def test_rows_beyond_the_checkpoint_are_cut_and_half_a_row_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n{"step": 6, "tr')
    JsonLines(path, keep_to_step=2).write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2, 3]


def test_the_last_scores_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    assert last_scores(tmp_path) == {}
    rows = [{"step": 0, "eval/loss": 3.0}, {"step": 2, "eval/loss": 1.0, "train/loss": 2.0}, {"step": 3, "train/loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_scores(tmp_path) == {"eval/loss": 1.0}


def test_a_row_is_the_mean_over_targets_since_the_row_before(collator: Collator) -> None:
    meter = Meter(Ranks(Accelerator(cpu=True)))
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
    meter.add(packs[:1], torch.tensor(1.0), torch.tensor(0.1), data_wait_s=0.0)
    assert meter.row()["train/target_tokens"] == packs[0].num_targets
