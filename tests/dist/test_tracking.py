"""Whole runs with W&B beside them: one run there through a kill, no secret in its files, and a tracker that blocks."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from tests.commands import read_rows
from tests.processes import run_ranks, start_ranks, train_main
from tests.run.wandb_files import read_starts
from vl_dist.data.collate import Batch
from vl_dist.model.packed import PackedModel
from vl_dist.run.wandb_tracker import WandbTracker
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

CANARY = "canary4711canary4711canary4711canary4711"


def words(data: Path, run: Path, *more: str) -> list[str]:
    return [
        f"shapes.dir={data}", "shapes.num_train=12", "shapes.num_eval=2", f"model.path={data}/model",
        f"data.train={data}/records.jsonl", f"data.eval={data}/eval.jsonl", "data.num_workers=0", "run.cpu_threads=1",
        "batch.examples_per_step=4", "eval.max_new_tokens=4", "checkpoint.every_steps=1", "log.every_steps=1",
        "log.wandb=offline", f"run.output_dir={run}", *more,
    ]  # fmt: skip


def train_with_a_secret(arguments: list[str]) -> int:
    os.environ.update(WANDB_API_KEY=CANARY, MY_SECRET=CANARY)
    return train_main(arguments)


def train_beside_a_block(arguments: list[str]) -> int:
    """train.py, where W&B does not answer for 30 s."""

    def start(_tracker: Any) -> None:
        time.sleep(30)

    WandbTracker.start = start  # type: ignore[method-assign]
    return train_main([*arguments, "run.max_time=0.001"])


def test_a_killed_run_goes_on_as_the_same_run_with_every_row_and_without_a_secret(tmp_path: Path) -> None:
    data, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    make_shapes(ShapesConfig(dir=data, num_train=12, num_eval=2))
    given = words(data, run, "optim.max_steps=60")
    started = start_ranks(train_with_a_secret, given, world_size=1, log=log)
    give_up = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not list(run.glob("wandb/offline-run-*/*.wandb")):
        assert started.processes[0].is_alive() and time.monotonic() < give_up, log.read_text()[-3000:]
        time.sleep(0.01)
    time.sleep(0.3)
    started.kill()
    assert run_ranks(train_with_a_secret, given, world_size=1, log=log) == [0], log.read_text()[-3000:]
    starts = read_starts(run)
    assert len(starts) == 2 and starts[1].run.run_id == starts[0].directory.name.rsplit("-")[-1]
    logged: dict[int, dict[str, Any]] = {}
    for row in [row for start in starts for row in start.rows() if "eval/samples._type" not in row]:
        logged[row["step"]] = row
    rows = [{name: value for name, value in row.items() if value is not None} for row in read_rows(run / "metrics.jsonl")]
    last = [row for row in rows if row["step"] in {row["step"] for row in starts[1].rows()}]
    assert rows[-1]["step"] == 60 and len(last) > 1
    assert all(logged[row["step"]].keys() == row.keys() for row in last)
    assert starts[1].rows("eval/samples._type")[-1]["step"] == 60
    assert "adapter_model.safetensors" in starts[1].files_of("model")
    assert starts[1].config["optim"]["max_steps"] == 60
    state = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())
    assert state["wandb_run"] == starts[1].run.run_id
    # Started again, it is finished, and W&B hears nothing of it.
    assert run_ranks(train_with_a_secret, given, world_size=1, log=log) == [0] and "is finished" in log.read_text()
    assert len(read_starts(run)) == 2
    assert CANARY not in log.read_text()
    leaks = [path for path in run.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert leaks == []


def test_a_tracker_that_blocks_does_not_keep_a_stop_from_its_25_s(tmp_path: Path) -> None:
    data, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    make_shapes(ShapesConfig(dir=data, num_train=12, num_eval=2))
    codes = run_ranks(train_beside_a_block, words(data, run), world_size=1, log=log)
    assert codes == [85], log.read_text()[-3000:]
    assert "W&B did not finish in time" in log.read_text()
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == 1


def train_with_nan(arguments: list[str], bad_calls: list[int], stop_at: int | None) -> int:
    """train.py, in which some losses are no number, and which gets a SIGTERM in one of its steps."""
    forward, calls = PackedModel.forward, []

    def spoilt(self: PackedModel, batch: Batch) -> torch.Tensor:
        loss = forward(self, batch)
        if self.training:
            calls.append(0)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss * float("nan") if self.training and len(calls) in bad_calls else loss

    PackedModel.forward = spoilt  # type: ignore[method-assign]
    return train_main(arguments)


def test_a_run_of_which_only_a_checkpoint_is_left_is_the_same_there_and_nan_and_preemption_are_alerts(tmp_path: Path) -> None:
    data, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    make_shapes(ShapesConfig(dir=data, num_train=12, num_eval=2))
    more = ["run.self_test=false", "optim.max_steps=6", "data.eval=null"]
    skipping = [*words(data, run, *more), "optim.nonfinite=skip"]
    assert run_ranks(train_with_nan, skipping, [2], 3, world_size=1, log=log) == [85], log.read_text()[-3000:]
    (first,) = read_starts(run)
    alerts = [(one.title, one.text) for one in first.of("alert")]
    assert [title for title, _ in alerts] == ["A step was skipped", "The run was stopped"]
    assert "rank 0 has loss nan" in alerts[0][1] and "SIGTERM" in alerts[1][1]

    alone = tmp_path / "alone" / "step-000003"
    shutil.copytree(run / "checkpoints" / "step-000003", alone)
    copy, branch = tmp_path / "copy", tmp_path / "branch"
    given = [*words(data, copy, *more), f"run.resume={alone}"]
    assert run_ranks(train_with_nan, given, [2], None, world_size=1, log=log) == [2], log.read_text()[-3000:]
    (second,) = read_starts(copy)
    assert second.run.run_id == first.run.run_id
    (failed,) = second.of("alert")
    assert failed.title == "The run failed" and "Step 5 cannot be taken: rank 0 has loss nan" in failed.text

    given = [*words(data, branch, *more), f"run.resume={run / 'checkpoints' / 'step-000003'}"]
    assert run_ranks(train_main, given, world_size=1, log=log) == [0], log.read_text()[-3000:]
    (other,) = read_starts(branch)
    assert other.run.run_id != first.run.run_id, "two directories that go on are two runs"
