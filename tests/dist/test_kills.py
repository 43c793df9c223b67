"""Runs that are killed, or whose disk fills up, again and again."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.commands import read_rows
from tests.processes import run_ranks, start_ranks, train_main
from vl_dist.run import checkpoint
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

NUM_STEPS = 90
NUM_KILLS = 6
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kills")
    make_shapes(ShapesConfig(dir=home / "data", num_train=12, num_eval=1))
    return home


def words(home: Path, run: Path, *more: str) -> list[str]:
    """The embedded default, shortened."""
    data = home / "data"
    return [
        f"shapes.dir={data}", "shapes.num_train=12", "shapes.num_eval=1", f"model.path={data}/model",
        f"data.train={data}/records.jsonl", "data.eval=null", "data.num_workers=0", "run.cpu_threads=1", "lora.dropout=0.1",
        "batch.examples_per_step=4", f"optim.max_steps={NUM_STEPS}", "checkpoint.every_steps=1", "log.every_steps=1",
        f"run.output_dir={run}", *more,
    ]  # fmt: skip


def steps_of(run: Path) -> int:
    path = run / "ledger.jsonl"
    return sum('"ids"' in line for line in path.read_text().splitlines()) if path.is_file() else 0


def test_six_kills_at_random_moments_change_nothing(home: Path) -> None:
    whole, run = home / "whole", home / "killed"
    assert run_ranks(train_main, words(home, whole), world_size=1, log=home / "whole.log") == [0]
    drawn = random.Random(5)
    killed_at = []
    for number in range(NUM_KILLS):
        before = steps_of(run)
        started = start_ranks(train_main, words(home, run), world_size=1, log=home / f"kill-{number}.log")
        give_up = time.monotonic() + 120
        while steps_of(run) < before + drawn.randint(1, 4):
            assert started.processes[0].is_alive() and time.monotonic() < give_up, started.log.read_text()[-3000:]
            time.sleep(0.001)
        time.sleep(drawn.uniform(0, 0.06))
        started.kill()
        assert started.processes[0].exitcode == -signal.SIGKILL
        killed_at.append(steps_of(run))
    assert killed_at[-1] < NUM_STEPS
    log = home / "last.log"
    assert run_ranks(train_main, words(home, run), world_size=1, log=log) == [0]
    assert "Going on from" in log.read_text()
    for name in ("ledger.jsonl", f"adapter/{WEIGHTS}", "checkpoints/latest/optimizer.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), (name, killed_at)


def train_on_a_full_disk(arguments: list[str], full_at: tuple[int, ...]) -> int:
    """train.py, where the disk is full when the checkpoints of these steps are written."""
    write = checkpoint.save_file

    def save_file(tensors: object, path: Path, *rest: object, **more: object) -> None:
        assert os.environ.get("RANK", "0") == "0", "only rank 0 writes"
        if any(f"{step:06d}" in str(path) for step in full_at):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(tensors, path, *rest, **more)  # type: ignore[arg-type]

    checkpoint.save_file = save_file  # type: ignore[assignment]
    return train_main(arguments)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(home: Path) -> None:
    run, log = home / "full", home / "full.log"
    given = words(home, run, "optim.max_steps=4", "checkpoint.keep=null")
    codes = run_ranks(train_on_a_full_disk, given, (2, 4), world_size=2, log=log, config_file="zero2.yaml")
    assert codes == [0, 0], log.read_text()[-3000:]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-000001", "step-000003", "latest"}
    assert (run / "checkpoints" / "latest").readlink() == Path("step-000003")
    for step in (2, 4):
        assert f"Step {step} has no checkpoint: [Errno 28] No space left on device" in log.read_text()
    assert json.loads((run / "outcome.json").read_text())["code"] == 0
    assert (run / "adapter" / WEIGHTS).is_file()


def test_a_stop_that_cannot_be_saved_is_no_orderly_stop(home: Path) -> None:
    run, log = home / "unsaved", home / "unsaved.log"
    given = words(home, run, "optim.max_steps=4", "run.max_time=0.001")
    codes = run_ranks(train_on_a_full_disk, given, (1,), world_size=2, log=log, config_file="cpu.yaml")
    assert codes == [2, 2], log.read_text()[-3000:]
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == 2 and "no checkpoint" in outcome["reason"] and "No space left" in outcome["reason"]


def test_a_time_limit_stops_all_ranks_with_a_checkpoint_and_the_same_command_goes_on(home: Path) -> None:
    """Each start is out of time after its first step."""
    whole, run, log = home / "timed-whole", home / "timed", home / "timed.log"
    limits = ("optim.max_steps=3", "run.max_time=0.001")
    for step in (1, 2):
        codes = run_ranks(train_main, words(home, run, *limits), world_size=2, log=log, config_file="zero1.yaml")
        assert codes == [85, 85], log.read_text()[-3000:]
        outcome = json.loads((run / "outcome.json").read_text())
        assert (outcome["code"], outcome["step"]) == (85, step) and "run.max_time" in outcome["reason"]
    for limited, directory in ((limits, run), (limits[:1], whole)):
        arguments = words(home, directory, *limited)
        assert run_ranks(train_main, arguments, world_size=2, log=log, config_file="zero1.yaml") == [0, 0]
    assert (run / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3]
    shutil.rmtree(whole)
