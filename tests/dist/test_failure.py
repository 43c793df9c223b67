"""A rank that dies, stops or stands still: the others end promptly, it is named, and stacks are written."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_resume import DDP, ZERO3, Layout, words
from tests.examples import packed_model
from tests.processes import start_ranks, train_main
from tests.run.wandb_files import read_starts
from vl_dist.data import pictures
from vl_dist.data.collate import Batch
from vl_dist.model.packed import PackedModel
from vl_dist.run import alive
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

SECONDS_TO_END = 25.0
CANARY = "c4n4ry-that-must-not-be-seen"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")


def fail(arguments: list[str], how: str, failing_rank: int) -> int:
    """train.py, in which one rank fails in the third step."""
    os.environ.update({name: CANARY for name in SECRETS})
    alive.Watch.__init__.__kwdefaults__["between_s"] = 0.5
    if int(os.environ["RANK"]) != failing_rank:
        return train_main(arguments)
    forward, load = PackedModel.forward, pictures.load_image
    begun: list[float] = []

    def dying(self: PackedModel, batch: Batch) -> torch.Tensor:
        begun.append(time.monotonic())
        if len(begun) > 10:
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        return forward(self, batch)

    def waiting_for_a_disk_that_never_answers(path: Path) -> Any:
        begun.append(time.monotonic())
        while len(begun) > 14:
            time.sleep(0.1)
        return load(path)

    if how == "stands still":
        pictures.load_image = waiting_for_a_disk_that_never_answers
    else:
        PackedModel.forward = dying  # type: ignore[method-assign]
    return train_main(arguments)


@pytest.mark.parametrize(
    ("how", "failing_rank", "layout"),
    [("dies", 1, DDP), ("dies", 0, DDP), ("dies", 1, ZERO3), ("is stopped", 1, DDP), ("stands still", 1, DDP)],
    ids=lambda value: value.name if isinstance(value, Layout) else str(value),
)
def test_the_others_end_and_name_the_rank_that_is_lost(home: Path, how: str, failing_rank: int, layout: Layout) -> None:
    run = home / f"{how.replace(' ', '-')}-{failing_rank}-{layout.name}"
    log = run.with_suffix(".log")
    tracked = ["log.wandb=offline"] if how == "stands still" else []
    arguments = [*words(home, run, 0.0), *tracked, "run.self_test=false", f"run.stall_timeout={4 if how == 'stands still' else 60}"]
    started = start_ranks(fail, arguments, how, failing_rank, world_size=2, log=log, config_file=layout.config_file)
    lost, other = started.processes[failing_rank], started.processes[1 - failing_rank]
    if how == "dies":
        lost.join(120)
        assert lost.exitcode == -signal.SIGKILL
    else:  # from the last checkpoint on nothing moves
        give_up = time.monotonic() + 120
        while not (run / "checkpoints").is_dir() and time.monotonic() < give_up:
            time.sleep(0.1)
    began = time.monotonic()
    other.join(SECONDS_TO_END + (20 if how != "dies" else 0))
    code, took = other.exitcode, time.monotonic() - began
    started.kill()
    assert code == 1, (code, took, log.read_text()[-3000:])
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == 1
    assert f"rank {failing_rank} (process {lost.pid} on " in outcome["reason"]
    assert f"rank {1 - failing_rank} (" not in outcome["reason"]
    assert "start again" in outcome["reason"]
    assert log.read_text().count(outcome["reason"]) == 1
    if how == "stands still":
        assert "stands still" in outcome["reason"] and "loading after step" in outcome["reason"]
        stacks = [(run / "stacks" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
        assert "waiting_for_a_disk_that_never_answers" in stacks[1]
        assert "waiting_for_a_disk_that_never_answers" not in stacks[0] and "train.py" in stacks[0]
        (start,) = read_starts(run)
        assert [(one.title, one.text) for one in start.of("alert")] == [("The run ended: a rank is lost", outcome["reason"])]
    else:
        assert "is gone" in outcome["reason"]
        assert "Traceback" not in log.read_text()
        assert (run / "stacks" / f"rank-{1 - failing_rank:05d}.txt").is_file()
    for path in [log, *(path for path in run.rglob("*") if path.is_file())]:
        assert CANARY.encode() not in path.read_bytes(), path
