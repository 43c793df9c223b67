"""Ten steps of the tutorial's recipe are ten steps of the tutorial's script.

Both start from one adapter and train in float32 without dropout on real photographs, one through `train.py`, the other on HF
Trainer (`benchmarks.tutorial`). Every step's loss and what each LoRA tensor has moved by must agree. The same comparison is
then shown to refuse a recipe that is wrong in one place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import load_peft_weights
from transformers import Qwen2VLForConditionalGeneration

import train
from benchmarks.tutorial import TARGET_MODULES, TutorialSettings, train_tutorial
from vl_dist.run.outcome import FINISHED

RECIPE = "recipes/coco2014_tutorial.yaml"
NUM_STEPS = 10
NUM_ROWS = 48  # 44 to train on, so that ten steps of four end before the epoch does
CAPTIONS = (
    "A cat.",
    "A man riding a wave on top of a surfboard.",
    "Two rockets stand side by side under a clear sky. A cup of coffee stands on a wooden table, and a cat sits next to it.",
    "A table!",
    "Wooden.",
    "A cup of coffee, and what is in the picture? " * 4,
    "A surfboard on a wave",
)
LOSS_TOLERANCE = 1e-4  # relative, of each step
DELTA_TOLERANCE = 0.02  # of each tensor's movement

Adapter = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides are given."""

    model: Path
    data: Path
    start: Path  # the adapter to start from


@dataclass(frozen=True, slots=True)
class Trained:
    """What both sides give back."""

    losses: tuple[float, ...]
    deltas: Adapter  # trained minus start


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest disagreement of two runs, over steps and over tensors."""

    loss: float
    delta: float

    @property
    def tolerable(self) -> bool:
        return self.loss <= LOSS_TOLERANCE and self.delta <= DELTA_TOLERANCE


def difference(ours: Trained, theirs: Trained) -> Difference:
    assert len(ours.losses) == len(theirs.losses) == NUM_STEPS
    assert ours.deltas.keys() == theirs.deltas.keys()
    losses = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    deltas = [float((ours.deltas[name] - delta).norm() / delta.norm()) for name, delta in theirs.deltas.items()]
    return Difference(max(losses), max(deltas))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a second thread gains nothing on tiny tensors, and costs much on a busy machine


@contextlib.contextmanager
def as_its_own_process() -> Iterator[None]:
    """A run inside leaves behind none of what is meant to last as long as its process.

    Accelerate keeps its device in class attributes and refuses another one; both libraries write environment variables, and
    train.py listens to signals.
    """

    def forget_devices() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    environment = dict(os.environ)
    forget_devices()
    try:
        yield
    finally:
        forget_devices()
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def task(tiny_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("tutorial")
    names = sorted(photo.name for photo in photos.glob("*.jpg"))
    for name in names:
        shutil.copy(photos / name, folder / name)
    rows = [tutorial_row(n, folder / names[n % len(names)], CAPTIONS[n % len(CAPTIONS)]) for n in range(NUM_ROWS)]
    (folder / "data_vl.json").write_text(json.dumps(rows))
    save_random_adapter(tiny_model, folder / "start")
    return Task(tiny_model, folder / "data_vl.json", folder / "start")


def tutorial_row(number: int, photo: Path, caption: str) -> dict[str, Any]:
    question = f"COCO Yes: <|vision_start|>{photo}<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": caption}]
    return {"id": f"identity_{number + 1}", "conversations": turns}


def save_random_adapter(model: Path, directory: Path) -> None:
    """Neither side of an update is zero, so that every tensor has a gradient from the first step on."""
    base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=list(TARGET_MODULES), r=64, lora_alpha=16, lora_dropout=0.0, bias="none"
    )
    adapter = get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * float(os.environ.get("SCALE", "0.1")))
    adapter.save_pretrained(directory)


@pytest.fixture(scope="module")
def theirs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    settings = TutorialSettings(
        model_dir=task.model,
        data=task.data,
        output_dir=tmp_path_factory.mktemp("theirs"),
        dtype=torch.float32,
        lora_dropout=0.0,
        start_from=task.start,
        shuffle=False,
        max_steps=NUM_STEPS,
        logging_steps=1, learning_rate=float(os.environ.get("LR", "1e-4")),
    )
    with as_its_own_process():
        run = train_tutorial(settings)
    return Trained(run.losses, moved_by(run.adapter, task))


def train_ours(task: Task, output_dir: Path, *changes: str) -> Trained:
    words = [
        RECIPE,
        f"model.path={task.model}",
        "model.dtype=float32",
        f"data.train={task.data}",
        "data.eval=last:4",
        "data.shuffle=false",
        "data.num_workers=0",
        "lora.dropout=0", f"optim.lr={os.environ.get('LR', '1e-4')}",
        f"lora.init_from={task.start}",
        f"optim.max_steps={NUM_STEPS}",
        "eval.max_new_tokens=1",
        "log.every_steps=1",
        "run.cpu_threads=1",
        f"run.output_dir={output_dir}",
    ]
    with as_its_own_process():
        assert train.main([*words, *changes]) == FINISHED
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = tuple(row["train/loss"] for row in rows if "train/loss" in row)
    print([round(r["train/grad_norm"],3) for r in rows if "train/loss" in r])
    return Trained(losses, moved_by(load_peft_weights(str(output_dir / "adapter"), device="cpu"), task))


def moved_by(trained: Adapter, task: Task) -> Adapter:
    start = load_peft_weights(str(task.start), device="cpu")
    assert trained.keys() == start.keys()
    return {name: tensor - start[name] for name, tensor in trained.items()}

def _constant(monkeypatch):
    pass

def test_x(task: Task, theirs: Trained, tmp_path: Path, monkeypatch) -> None:
    import time
    t = time.time()
    for name, changes in {"ok": [], "two packs": ["batch.max_tokens_per_pack=400"], "lr": [f"optim.lr={float(os.environ.get('LR', '1e-4'))*.8}"], "noclip": ["optim.max_grad_norm=null"], "constant": ["optim.schedule=constant"], "end": ["data.end_token=<|im_end|>"]}.items():
        t = time.time()
        d = difference(train_ours(task, tmp_path / name, *changes), theirs)
        print(name, d, time.time() - t)
    original = train.make_optimizer
    def other(parameters, settings):
        o = original(parameters, settings)
        o.param_groups[0]["betas"] = (0.9, 0.95)
        return o
    monkeypatch.setattr(train, "make_optimizer", other)
    print("beta", difference(train_ours(task, tmp_path / "beta"), theirs))
    print(theirs.losses)
