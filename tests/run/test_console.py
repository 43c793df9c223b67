"""What a person sees, at two widths of a terminal and where there is none."""

import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.commands import read_rows
from tests.processes import run_ranks, train_main
from vl_dist.config import load
from vl_dist.run.console import RunConsole
from vl_dist.run.display import in_lines
from vl_dist.run.panels import describe_settings, next_commands
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes

WIDTHS = (80, 120)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROW: dict[str, float | None] = {
    "step": 123456, "epoch": 12.34, "train/loss": 0.123456, "train/grad_norm": 123.456, "train/lr": 1e-4,
    "perf/examples_per_s": 3456.7, "perf/mfu": 0.456, "perf/peak_memory_gib": 123.4,
}  # fmt: skip
FIGURES = ("epoch 12.34", "loss 0.1235", "grad 123.456", "lr 1.00e-04", "3456.7 examples/s", "MFU 45.6%", "123.4 GiB")


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False, _environ={}
    )


def written(console: Console) -> list[str]:
    """The lines that were drawn, one after the other, without what moves the cursor."""
    assert isinstance(console.file, io.StringIO)
    return re.split(r"[\r\n]+", CONTROL.sub("", console.file.getvalue()))


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_and_figures_keep_to_the_width_and_none_is_lost(width: int) -> None:
    console = terminal(width)
    shown = RunConsole(is_main=True, num_shown=1, console=console)
    with shown:
        for step in (123455, 123456):
            shown.train_step(step, 1_000_000)
        shown.row(ROW, 1_000_000)
        with shown.captioning() as progress:
            progress(4800, 14400)
            shown.say("some words that are told " * 10)
    lines = written(console)
    assert max(map(len, lines)) <= width
    drawn = "\n".join(lines)
    assert all(figure in drawn for figure in FIGURES)
    assert "123456/1000000" in drawn and "captioning" in drawn and "4800/14400" in drawn
    assert "\n".join(line.rstrip() for line in lines).count("some words that are told") >= 7


def test_time_left_counts_from_where_training_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    console, now = terminal(80), [0.0]
    console.get_time = lambda: now[0]  # type: ignore[method-assign]
    monkeypatch.setattr("vl_dist.run.display.time.monotonic", lambda: now[0])
    shown = RunConsole(is_main=True, num_shown=1, console=console)
    with shown:
        for step in range(901, 912):  # a second each; 900 were done by another start
            now[0] += 1.0
            shown.train_step(step, 1000)
    assert "0:01:29 left" in written(console)[-2] or "0:01:29 left" in written(console)[-3]


@pytest.mark.parametrize("loss", [0.5, None])
def test_elsewhere_each_logging_step_is_one_plain_line(loss: float | None) -> None:
    console = Console(file=io.StringIO(), width=80, _environ={})
    shown = RunConsole(is_main=True, num_shown=1, console=console)
    with shown:
        shown.train_step(123456, 1_000_000)
        shown.row(ROW | {"train/loss": loss}, 1_000_000)
        with shown.captioning() as progress:
            progress(1, 2)
    lines = written(console)
    assert len(lines) == 2 and lines[1] == ""
    assert lines[0].startswith("step 123456/1000000  epoch 12.34  ")
    assert ("loss skipped" in lines[0]) == (loss is None)
    assert all(figure in lines[0] for figure in FIGURES if not figure.startswith(("loss", "grad")))


def test_figures_flow_into_lines_and_are_never_broken() -> None:
    assert list(in_lines(["aa", "bb", "cc"], 6)) == ["aa  bb", "cc"]
    assert list(in_lines(["a long one", "b"], 4)) == ["a long one", "b"]
    assert list(in_lines([], 80)) == []


def test_effective_settings_are_those_that_differ_from_the_defaults() -> None:
    shown = describe_settings(
        load(None, ["optim.lr=2e-4", "data.eval=last:3", "run.output_dir=x", "optim.max_grad_norm=null"])
    )
    assert shown.splitlines() == ["data: eval=last:3", "optim: lr=0.0002, max_grad_norm=null"]
    assert describe_settings(load(None)) == ""


def test_commands_are_printed_whole_whatever_the_width() -> None:
    directory = Path("/a/directory/with/a/name/that/is/longer/than/a/terminal/is/wide/and/then/some")
    console = terminal(40)
    RunConsole(is_main=True, num_shown=1, console=console).say("\n".join(next_commands(directory)), whole_lines=True)
    assert f"python -m vl_dist predict {directory}/adapter IMAGE" in written(console)
    assert f"python -m vl_dist report {directory}" in written(console)


def train_on_a_terminal(arguments: list[str], width: int) -> int:
    """train.py, which takes its output for a terminal of this width."""
    os.environ.update(TTY_COMPATIBLE="1", COLUMNS=str(width), TERM="xterm")
    return train_main(arguments)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_whole_run_keeps_to_the_width_and_says_what_one_wants_to_know(tmp_path: Path, width: int) -> None:
    data, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    make_shapes(ShapesConfig(dir=data, num_train=12, num_eval=4))
    words = [
        f"shapes.dir={data}", "shapes.num_train=12", "shapes.num_eval=4", f"model.path={data}/model", "run.cpu_threads=1",
        f"data.train={data}/records.jsonl", f"data.eval={data}/eval.jsonl", "data.num_workers=0", "optim.max_steps=4",
        "batch.examples_per_step=4", "eval.max_new_tokens=4", "eval.batch_size=3", "eval.every_steps=2",
        "log.every_steps=1", "log.peak_tflops=1", f"run.output_dir={run}",
    ]  # fmt: skip
    assert run_ranks(train_on_a_terminal, words, width, world_size=1, log=log) == [0], log.read_text()[-3000:]
    lines = re.split(r"[\r\n]+", CONTROL.sub("", log.read_text()))
    broken = [line for line in lines if len(line) > width and "python -m vl_dist" not in line and str(tmp_path) not in line]
    assert broken == []
    text = " ".join(" ".join(lines).replace("│", " ").split())
    for part in (
        "float32 (auto), attention sdpa (auto)",
        "plan 4 steps of 4 examples, 15 an epoch; step 1 has 1 pack of at most 1,024 tokens",
        "devices 1 x cpu, 1 thread each",
        "optim: lr=0.002, num_epochs=8, max_steps=4",
        "W&B off (auto)",
        "training",
        "captioning",
        "epoch 0.27",
        "MFU",
        f"python -m vl_dist predict {run}/adapter IMAGE",
        f"python -m vl_dist report {run}",
    ):
        assert part in text, (part, text)
    assert "Loading weights" not in text
    best = max(
        (row for row in read_rows(run / "metrics.jsonl") if row["step"] in (2, 4)), key=lambda row: row["eval/cider"]
    )
    assert f"best cider {best['eval/cider']:.4f} at step {best['step']}" in text
