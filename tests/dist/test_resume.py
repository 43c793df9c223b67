"""A run taken up from a checkpoint: bit for bit on the same layout, the same run on another one."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands import read_rows
from tests.examples import assert_close, packed_model
from tests.processes import run_ranks, train_main
from vl_dist.run import checkpoint
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

NUM_STEPS = 8  # two epochs of 40 examples in steps of 13, 13, 13 and 1
WEIGHTS, MOMENTS = "adapter_model.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks there are, and what steps them."""

    world_size: int
    config_file: str | None

    @property
    def name(self) -> str:
        return f"{(self.config_file or 'plain').removesuffix('.yaml')}-{self.world_size}"


ONE = Layout(1, None)
DDP = Layout(2, "cpu.yaml")
ZERO1, ZERO2, ZERO3 = (Layout(2, f"zero{stage}.yaml") for stage in (1, 2, 3))


def words(home: Path, run: Path, dropout: float) -> list[str]:
    data = home / "data"
    return [
        f"shapes.dir={data}", "shapes.num_train=8", "shapes.num_eval=1", f"model.path={data}/model",
        f"data.train={data}/records.jsonl", "data.eval=null", "data.num_workers=0", "run.cpu_threads=1",
        "batch.examples_per_step=13", "batch.max_tokens_per_pack=100", "lora.r=4", "lora.alpha=8",
        f"lora.dropout={dropout}", f"lora.init_from={home / 'adapter'}", "optim.num_epochs=2", "optim.max_steps=null",
        "optim.lr=1e-3", "optim.warmup_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=null", "log.every_steps=1",
        f"run.output_dir={run}",
    ]  # fmt: skip


def go(home: Path, run: Path, layout: Layout, dropout: float) -> str:
    """Trains from where the run stands to its end; what was printed."""
    log = run.with_suffix(".log")
    log.unlink(missing_ok=True)
    arguments = words(home, run, dropout)
    codes = run_ranks(train_main, arguments, world_size=layout.world_size, log=log, config_file=layout.config_file)
    assert codes == [0] * layout.world_size, log.read_text()[-3000:]
    return log.read_text()


def cut_back(run: Path, step: int) -> None:
    """As a kill after this step's checkpoint leaves a run: rows of later steps are there, checkpoints are not."""
    shutil.rmtree(run / "adapter")
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def repeatable(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without speeds and memory."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> dict[Layout, Path]:
    runs = {layout: home / layout.name for layout in (ONE, ZERO3)}
    for layout, run in runs.items():
        go(home, run, layout, dropout=0.1)
    return runs


@pytest.mark.parametrize(
    ("layout", "step"),
    [(ONE, 2), (ONE, 3), (ONE, 4), (ONE, 6), (ZERO3, 3)],  # mid epoch, before the short step, end of an epoch, mid second epoch
    ids=lambda value: value.name if isinstance(value, Layout) else str(value),
)
def test_on_the_same_layout_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    home: Path, undisturbed: dict[Layout, Path], layout: Layout, step: int
) -> None:
    whole = undisturbed[layout]
    run = Path(shutil.copytree(whole, home / f"{layout.name}-from-{step}", symlinks=True))
    cut_back(run, step)
    assert f"step-{step:06d}" in go(home, run, layout, dropout=0.1)
    assert repeatable(run) == repeatable(whole)
    assert (run / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
    for number in range(step + 1, NUM_STEPS + 1):
        for name in (WEIGHTS, MOMENTS):
            path = Path("checkpoints") / f"step-{number:06d}" / name
            assert (run / path).read_bytes() == (whole / path).read_bytes(), path
    assert (run / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()


def test_a_run_that_changes_ranks_and_zero_stage_at_every_stop_is_the_run_of_one_process(home: Path) -> None:
    """ZeRO 3, 1, data parallel, one process, two again under ZeRO 2; a step or more each. Without dropout: a rank's differs."""
    whole = home / "exact"
    go(home, whole, ONE, dropout=0.0)
    run = home / "elastic"
    for layout, stop in ((ZERO3, 1), (ZERO1, 2), (DDP, 4), (ONE, 6), (ZERO2, NUM_STEPS)):
        printed = go(home, run, layout, dropout=0.0)
        assert f"{layout.world_size} x cpu" in printed
        if stop < NUM_STEPS:
            cut_back(run, stop)
    assert "Going on from" in printed and "step-000006" in printed
    assert (run / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
    for here, there in zip(repeatable(run), repeatable(whole), strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=1e-5)
        assert here["train/grad_norm"] == pytest.approx(there["train/grad_norm"], rel=1e-4)
        same = ("step", "epoch", "train/lr", "train/target_tokens")
        assert [here[name] for name in same] == [there[name] for name in same]
    for number in range(1, NUM_STEPS + 1):
        path = Path("checkpoints") / f"step-{number:06d}"
        assert_close(load_file(run / path / WEIGHTS), load_file(whole / path / WEIGHTS))
    # Second moments are squares of eight steps' gradients, and what was rounded adds up in them.
    assert_close(load_file(run / path / MOMENTS), load_file(whole / path / MOMENTS), tolerance=1e-3)


def test_a_rank_that_cannot_read_the_chosen_checkpoint_ends_all_with_one_message(
    home: Path, undisturbed: dict[Layout, Path]
) -> None:
    """As on machines whose disks are not shared: rank 1 sees an output directory without checkpoints."""
    run = Path(shutil.copytree(undisturbed[ONE], home / "not-shared", symlinks=True))
    cut_back(run, 3)
    log = home / "not-shared.log"
    codes = run_ranks(train_blind, words(home, run, 0.1), world_size=2, log=log, config_file="cpu.yaml")
    assert codes == [2, 2], log.read_text()[-3000:]
    assert log.read_text().count("Rank 1 cannot read the checkpoint") == 1
    assert "share" in log.read_text()


def train_blind(arguments: list[str]) -> int:
    """train.py, with what makes a checkpoint whole out of rank 1's sight."""
    if os.environ["RANK"] == "1":
        checkpoint.MANIFEST = "elsewhere.json"
    return train_main(arguments)
