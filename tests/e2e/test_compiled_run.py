"""A whole run with run.compile and model.recompute: rows say what was compiled, and losses and scores are as ever."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import read_rows
from tests.dist.test_tracking import words
from tests.processes import run_ranks, train_main
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes


def train_with_graphs(arguments: list[str]) -> int:
    """train.py, which makes graphs as ever and runs them without making kernels of them, which takes a minute."""
    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    return train_main(arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("compiled")
    make_shapes(ShapesConfig(dir=home / "data", num_train=12, num_eval=2))
    more = ["log.wandb=off", "lora.dropout=0", "optim.max_steps=6", "data.shuffle=false"]
    found = {}
    for name, switches in (("plain", []), ("compiled", ["run.compile=true", "model.recompute=every_2"])):
        found[name], log = home / name, home / f"{name}.log"
        arguments = words(home / "data", found[name], *more, *switches)
        assert run_ranks(train_with_graphs, arguments, world_size=1, log=log) == [0], log.read_text()[-3000:]
        assert ("graphs compiled" in log.read_text()) == (name == "compiled")
    return found


def test_rows_say_how_many_graphs_were_compiled_and_later_ones_none(runs: dict[str, Path]) -> None:
    rows = read_rows(runs["compiled"] / "metrics.jsonl")[1:]
    counts = [row["perf/recompiles"] for row in rows]
    assert counts[0] > 4 and counts[-1] == 0
    assert all("perf/recompiles" not in row for row in read_rows(runs["plain"] / "metrics.jsonl"))


def test_the_run_is_the_same(runs: dict[str, Path]) -> None:
    plain, compiled = (read_rows(runs[name] / "metrics.jsonl") for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled, strict=True):
        names = [name for name in ("train/loss", "eval/loss", "train/grad_norm") if name in one]
        assert names and [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
    weights = [load_file(runs[name] / "adapter" / "adapter_model.safetensors") for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()
