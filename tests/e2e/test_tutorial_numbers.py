"""Ten steps of the tutorial's recipe are ten steps of the tutorial's script.

Both start from one adapter and train in float32 without dropout on real photographs, one through `train.py`, the other on
HF Trainer (`benchmarks.tutorial`). Every step's loss, and what each LoRA tensor has moved by, must agree. The same
comparison is then shown to refuse a recipe that is wrong in one place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import load_peft_weights
from transformers import Qwen2VLForConditionalGeneration

import train
from benchmarks.tutorial import TARGET_MODULES, TutorialSettings, train_tutorial
from vl_dist.run.optim import make_optimizer
from vl_dist.run.outcome import FINISHED
from vl_dist.settings import OptimConfig

RECIPE = Path(train.__file__).parent / "recipes" / "coco2014_tutorial.yaml"
NUM_STEPS = 10
NUM_ROWS = 48  # 44 to train on, so that ten steps of four end before the epoch does

# Each step has a language of its own, so that gradients point elsewhere from step to step and their norms lie on both sides
# of the clipping norm. With similar steps AdamW would hide most mistakes, because it divides by the gradient's size.
CAPTIONS = (
    "A cat sits.",
    "Кот сидит на столе у чашки кофе.",
    "两枚火箭并排立在晴空下。",
    "Ένας άντρας πάνω σε ένα κύμα",
    "Une tasse de café près d'une fenêtre éclairée, où dort un chat gris.",
    "7 rockets!!",
    "القط على الطاولة",
    "猫がテーブルの上に座っている",
    "QUIET #42 ~~~ {x}",
    "zigzag",
    "Ein Stuhl, ein Tisch; draußen schneit es.",
)

LOSS_TOLERANCE = 1e-4  # relative, of each step
# Of each tensor's movement. Rounding makes less than 0.0001 of it; beta2 0.95 makes no more than 0.013 in so few steps.
MOVEMENT_TOLERANCE = 0.002

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides are given."""

    model: Path
    data: Path
    start: Path  # the adapter to start from


@dataclass(frozen=True, slots=True)
class Trained:
    """What both sides give back."""

    losses: tuple[float, ...]  # of each step
    movement: Tensors  # the trained adapter minus the one at the start


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs disagree most, over steps and over tensors."""

    loss: float
    movement: float

    @property
    def tolerable(self) -> bool:
        return self.loss <= LOSS_TOLERANCE and self.movement <= MOVEMENT_TOLERANCE


def difference(ours: Trained, theirs: Trained) -> Difference:
    assert len(ours.losses) == len(theirs.losses) == NUM_STEPS
    assert ours.movement.keys() == theirs.movement.keys()
    losses = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    movements = [float((ours.movement[name] - moved).norm() / moved.norm()) for name, moved in theirs.movement.items()]
    return Difference(max(losses), max(movements))


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """A training inside neither finds nor leaves what is meant to last as long as its process.

    Accelerate keeps the device in class attributes and refuses another one, transformers sets environment variables, and
    train.py listens to signals. One thread: tiny tensors gain nothing by a second one, which on busy cores waits for long.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_devices()
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        forget_devices()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def forget_devices() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(scope="module")
def task(tiny_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("tutorial")
    names = sorted(photo.name for photo in photos.glob("*.jpg"))
    for name in names:
        shutil.copy(photos / name, folder / name)
    rows = [tutorial_row(n, folder / names[n % len(names)]) for n in range(NUM_ROWS)]
    (folder / "data_vl.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    save_random_adapter(tiny_model, folder / "start")
    return Task(tiny_model, folder / "data_vl.json", folder / "start")


def tutorial_row(number: int, photo: Path) -> dict[str, Any]:
    """One row of the tutorial's file. Captions within a step differ in length, so rows are padded and packs uneven."""
    caption = CAPTIONS[number // 4 % len(CAPTIONS)] * (1 + number % 3)
    question = f"COCO Yes: <|vision_start|>{photo}<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": caption}]
    return {"id": f"identity_{number + 1}", "conversations": turns}


def save_random_adapter(model: Path, directory: Path) -> None:
    """Neither factor of an update is zero, so every tensor has a gradient from the first step on."""
    base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=list(TARGET_MODULES), r=64, lora_alpha=16)
    adapter = get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter.save_pretrained(directory)


@pytest.fixture(scope="module")
def theirs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The tutorial's script, with its own numbers; only dropout and order are taken out of chance."""
    settings = TutorialSettings(
        model_dir=task.model,
        data=task.data,
        output_dir=tmp_path_factory.mktemp("theirs"),
        dtype=torch.float32,
        lora_dropout=0.0,
        start_from=task.start,
        shuffle=False,
        max_steps=NUM_STEPS,
    )
    with as_if_alone():
        run = train_tutorial(settings)
    return Trained(run.losses, movement(run.adapter, task))


def train_ours(task: Task, output_dir: Path, *changes: str) -> Trained:
    """The recipe's own numbers, and the same taken out of chance; `changes` come last and win."""
    words = [
        str(RECIPE),
        f"model.path={task.model}",
        "model.dtype=float32",
        f"lora.init_from={task.start}",
        "lora.dropout=0",
        f"data.train={task.data}",
        "data.shuffle=false",
        "data.num_workers=0",
        f"optim.max_steps={NUM_STEPS}",
        "eval.max_new_tokens=1",
        "log.every_steps=1",
        f"run.output_dir={output_dir}",
        "run.cpu_threads=1",
    ]
    with as_if_alone():
        assert train.main([*words, *changes]) == FINISHED
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = tuple(row["train/loss"] for row in rows if "train/loss" in row)
    return Trained(losses, movement(load_peft_weights(str(output_dir / "adapter"), device="cpu"), task))


def movement(trained: Tensors, task: Task) -> Tensors:
    start = load_peft_weights(str(task.start), device="cpu")
    assert trained.keys() == start.keys()
    return {name: tensor - start[name] for name, tensor in trained.items()}


@pytest.mark.parametrize("max_tokens_per_pack", [8192, 400])
def test_ten_steps_of_the_tutorials_recipe_equal_the_tutorials_script(
    task: Task, theirs: Trained, tmp_path: Path, max_tokens_per_pack: int
) -> None:
    """8,192 tokens hold a whole step; with 400 it comes in two to four packs of unequal numbers of targets."""
    ours = train_ours(task, tmp_path / "ours", f"batch.max_tokens_per_pack={max_tokens_per_pack}")
    assert all(moved.norm() > 0 for moved in theirs.movement.values())
    found = difference(ours, theirs)
    assert found.tolerable, found


@pytest.mark.parametrize(
    "mistake",
    ["optim.lr=0.8e-4", "optim.max_grad_norm=null", "optim.schedule=constant", "data.end_token=<|im_end|>"],
)
def test_the_comparison_refuses_a_recipe_that_is_wrong_in_one_place(
    task: Task, theirs: Trained, tmp_path: Path, mistake: str
) -> None:
    found = difference(train_ours(task, tmp_path / "ours", mistake), theirs)
    assert not found.tolerable, found


def test_the_comparison_refuses_another_beta2(
    task: Task, theirs: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_beta2_of_095(parameters: Iterable[torch.nn.Parameter], settings: OptimConfig) -> torch.optim.AdamW:
        optimizer = make_optimizer(parameters, settings)
        optimizer.param_groups[0]["betas"] = (0.9, 0.95)
        return optimizer

    monkeypatch.setattr("vl_dist.run.engine.make_optimizer", with_beta2_of_095)
    found = difference(train_ours(task, tmp_path / "ours"), theirs)
    assert not found.tolerable, found
