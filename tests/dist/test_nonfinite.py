"""A loss or a gradient that is no number, on one rank: all ranks skip the step or stop before it, under every engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import read_rows
from tests.dist.test_resume import DDP, ONE, WEIGHTS, ZERO1, ZERO2, ZERO3, Layout, cut_back, repeatable, words
from tests.examples import assert_close, packed_model
from tests.processes import run_ranks, train_main
from vl_dist.data.collate import Batch
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes


def train_with_nan(arguments: list[str], bad: list[str], where: str) -> int:
    """train.py, with packs that hold one of the bad examples spoilt."""
    forward = PackedModel.forward

    def spoilt(self: PackedModel, batch: Batch) -> torch.Tensor:
        loss = forward(self, batch)
        if not self.training or not set(bad) & set(batch.example_ids):
            return loss
        return loss * float("nan") if where == "loss" else loss + (loss * 0.0).sqrt()  # whose slope at 0 is infinite

    PackedModel.forward = spoilt  # type: ignore[method-assign]
    return train_main(arguments)


def go(
    home: Path, run: Path, layout: Layout, bad: list[str], *more: str, where: str = "loss"
) -> tuple[list[int | None], str]:
    log = run.with_suffix(".log")
    log.unlink(missing_ok=True)
    arguments = [*words(home, run, 0.0), "optim.max_steps=5", *more]
    codes = run_ranks(
        train_with_nan, arguments, bad, where, world_size=layout.world_size, log=log, config_file=layout.config_file
    )
    return codes, log.read_text()


@pytest.fixture(scope="module")
def steps(home: Path) -> list[list[str]]:
    """The ids of each step of a run without faults."""
    assert go(home, home / "plain", ONE, [])[0] == [0]
    return [row["ids"] for row in read_rows(home / "plain" / "ledger.jsonl") if "ids" in row]


SKIP = "optim.nonfinite=skip"


@pytest.fixture(scope="module")
def skipped(home: Path, steps: list[list[str]]) -> Path:
    """One process that skips the first step and the third."""
    run = home / "skipped"
    codes, printed = go(home, run, ONE, [steps[0][0], steps[2][5]], SKIP)
    assert codes == [0], printed[-3000:]
    return run


def test_a_skipped_step_changes_nothing_and_stands_in_the_ledger(
    home: Path, steps: list[list[str]], skipped: Path
) -> None:
    rows = [row for row in read_rows(skipped / "ledger.jsonl") if "ids" in row]
    assert [row["ids"] for row in rows] == [[], steps[1], [], steps[3], steps[4]]
    assert [rows[n]["skipped"] for n in (0, 2)] == [steps[0], steps[2]]
    assert f"step 3 was skipped: rank 0 has loss nan in a pack of " in rows[2]["reason"] and steps[2][5] in rows[2]["reason"]
    coverage = next(row for row in read_rows(skipped / "ledger.jsonl") if "as_planned" in row)
    assert sorted(coverage["missing"]) == sorted(steps[0] + steps[2])
    metrics = read_rows(skipped / "metrics.jsonl")
    assert [row["train/skipped_steps"] for row in metrics] == [1, 0, 1, 0, 0]
    assert [row["train/loss"] is None for row in metrics] == [True, False, True, False, False]
    weights = [load_file(skipped / "checkpoints" / f"step-{n:06d}" / WEIGHTS) for n in range(1, 5)]
    start = load_file(home / "adapter" / WEIGHTS)
    assert all(torch.equal(weights[0][name], start[name]) for name in start)
    assert all(torch.equal(weights[2][name], weights[1][name]) for name in start)
    assert any(not torch.equal(weights[3][name], weights[2][name]) for name in start)


def test_resuming_after_a_skipped_step_is_bit_for_bit(home: Path, steps: list[list[str]], skipped: Path) -> None:
    """AdamW counts the steps it took, not those of the plan."""
    state = json.loads((skipped / "checkpoints" / "step-000004" / "state.json").read_text())
    assert (state["step"], state["skipped"]) == (4, 2)
    expected = {name: tensor.clone() for name, tensor in load_file(skipped / "adapter" / WEIGHTS).items()}
    before = repeatable(skipped)
    for step in (1, 3):
        cut_back(skipped, step)
        codes, printed = go(home, skipped, ONE, [steps[0][0], steps[2][5]], SKIP)
        assert codes == [0] and f"step-{step:06d}" in printed
        assert repeatable(skipped) == before
        found = load_file(skipped / "adapter" / WEIGHTS)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("layout", [DDP, ZERO1, ZERO2, ZERO3], ids=lambda layout: layout.name)
def test_many_ranks_skip_what_one_rank_meets_and_train_on_as_one_process_does(
    home: Path, steps: list[list[str]], skipped: Path, layout: Layout, where: str
) -> None:
    run = home / f"{layout.name}-{where}"
    codes, printed = go(home, run, layout, [steps[0][0], steps[2][5]], SKIP, where=where)
    assert codes == [0, 0], printed[-3000:]
    here, there = (
        [(row["ids"], row.get("skipped")) for row in read_rows(one / "ledger.jsonl") if "ids" in row] for one in (run, skipped)
    )
    assert here == there
    reasons = [row["reason"] for row in read_rows(run / "ledger.jsonl") if "reason" in row]
    blamed = "has loss nan in a pack of" if where == "loss" else "every loss is a number, but the gradient is not"
    assert len(reasons) == 2 and all(blamed in reason for reason in reasons)
    assert_close(load_file(run / "adapter" / WEIGHTS), load_file(skipped / "adapter" / WEIGHTS))


@pytest.mark.parametrize("layout", [DDP, ZERO3], ids=lambda layout: layout.name)
def test_by_default_all_ranks_stop_before_the_step_and_name_the_examples_and_the_rank(
    home: Path, steps: list[list[str]], layout: Layout
) -> None:
    run = home / f"{layout.name}-stop"
    codes, printed = go(home, run, layout, [steps[2][5]])
    assert codes == [2, 2], printed[-3000:]
    outcome: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (2, 2)
    for part in ("Step 3 cannot be taken", "has loss nan", steps[2][5], "optim.nonfinite=skip", "optim.lr", "rank "):
        assert part in outcome["reason"]
    assert printed.count("Step 3 cannot be taken") == 1 and "Traceback" not in printed
    assert (run / "checkpoints" / "latest").resolve().name == "step-000002"


def test_skipping_without_end_is_refused(home: Path, steps: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [name for step in steps for name in step]
    codes, printed = go(home, home / "hopeless", ONE, everything, SKIP, "optim.max_steps=20", "optim.num_epochs=5")
    assert codes == [2]
    assert "10 steps in a row were skipped" in printed
