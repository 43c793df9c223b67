"""What this project is compared with: the tutorial's loop, and TRL's SFTTrainer, on the examples of a workload."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Image, Value
from datasets import Sequence as Several
from peft import PeftModel
from qwen_vl_utils import process_vision_info
from transformers import PrinterCallback, Qwen2VLForConditionalGeneration
from transformers.utils import logging

from benchmarks.loading import SHAPE
from benchmarks.task import Gradient, Task, Way
from benchmarks.tutorial import (
    NO_TARGET,
    TEXT,
    StepLosses,
    encode,
    load_model,
    load_rows,
    padding_collator,
    training_arguments,
)
from benchmarks.workloads import END_TOKEN
from vl_dist.data.images import resize_image
from vl_dist.data.records import Example, messages_to_json

Rows = dict[str, Any]
SHOWN = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "packing", "padding_free",
    "max_length", "loss_type", "optim", "max_grad_norm", "bf16", "dataloader_num_workers",
)  # fmt: skip


class Tutorial:
    """The tutorial's loop. It reads rows that were encoded before, outside the time."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = load_model(task.settings)
        coco = task.workload.name == "coco"
        self.rows: Any = _coco_rows(task) if coco else [encode_example(one, task) for one in task.workload.examples]
        self.collate = padding_collator(task.processor.tokenizer) if coco else ragged_collator(task.processor.tokenizer)

    def way(self, batch: int, accumulation: int) -> Way:
        """The loop at a batch."""
        settings = replace(self.task.settings, micro_batch_size=batch, gradient_accumulation_steps=accumulation)

        def begin() -> Callable[[], None]:
            arguments = training_arguments(settings)
            arguments.set_save(strategy="no")
            arguments.disable_tqdm = True
            trainer = StepLosses(
                model=self.model, args=arguments, train_dataset=self.rows, data_collator=self.collate, shuffle=False
            )
            return _runner(trainer)

        return Way(f"tutorial's loop, batch {batch} x {accumulation}", begin, self.gradient, batch * accumulation)

    def gradient(self) -> Gradient:
        """Of the mean loss over the first examples as one batch."""
        self.model.eval()
        features = self.collate([self.rows[n] for n in range(self.task.workload.num_compared)])
        moved = {name: value.to(self.task.ranks.device) for name, value in features.items()}
        self.model(**moved).loss.backward()
        return _take_gradient(self.model)


class TrlPeer:
    """TRL's SFTTrainer at its defaults, but for what makes it train the same examples in the same precision."""

    def __init__(self, task: Task) -> None:
        from trl import SFTConfig

        self.task = task
        base = Qwen2VLForConditionalGeneration.from_pretrained(task.home / "model", dtype=task.dtype)
        base = base.to(task.ranks.device)
        self.model = PeftModel.from_pretrained(base, str(task.home / "start"), is_trainable=True)
        self.rows = _trl_rows(task)
        self.arguments = SFTConfig(
            output_dir=str(task.home / "trl"),
            max_length=task.workload.trl_max_length,
            bf16=task.dtype == torch.bfloat16,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=task.ranks.device.type == "cpu",
        )

    def way(self) -> Way:
        """The trainer as a way."""
        shown = ", ".join(f"{name}={getattr(self.arguments, name)}" for name in SHOWN)
        batch = self.arguments.per_device_train_batch_size * self.arguments.gradient_accumulation_steps
        return Way(f"TRL's SFTTrainer, batch {batch}", lambda: _runner(self.trainer()), self.gradient, batch, shown)

    def trainer(self) -> Any:
        """A new one on the same model; rows in order, as for every way."""
        from trl import SFTTrainer

        class InOrder(SFTTrainer):  # type: ignore[misc]
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

        return InOrder(model=self.model, args=self.arguments, train_dataset=self.rows, processing_class=self.task.processor)

    def gradient(self) -> Gradient:
        """Of its own loss over the first examples as one batch: the mean over targets, as everywhere."""
        trainer = self.trainer()
        self.model.eval()
        features = trainer.data_collator([self.rows[n] for n in range(self.task.workload.num_compared)])
        moved = {name: value.to(self.task.ranks.device) for name, value in features.items()}
        trainer.compute_loss(self.model, moved).backward()
        return _take_gradient(self.model)


def no_progress_bars() -> None:
    """Of loading weights and of encoding rows: the table is what one wants to see."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def trl_installed() -> bool:
    """Whether the peer can be measured; benchmarks/requirements.txt has it."""
    return importlib.util.find_spec("trl") is not None


def encode_example(example: Example, task: Task) -> Rows:
    """An example as `benchmarks.tutorial.encode` makes a row: any number of images, each in its own size."""
    messages = [_with_paths(message, task.home) for message in messages_to_json(example.prompt)]
    processor = task.processor
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages)
    prompt = processor(text=[text], images=images, padding=True, return_tensors="pt")
    tokenizer = processor.tokenizer
    targets = torch.tensor([*tokenizer(example.answer, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id])
    ids = prompt["input_ids"][0]
    row = {
        "input_ids": torch.cat([ids, targets]),
        "attention_mask": torch.ones(len(ids) + len(targets), dtype=torch.int64),
        "labels": torch.cat([torch.full_like(ids, NO_TARGET), targets]),
        "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"][0], torch.full_like(targets, TEXT)]),
    }
    return row | {name: prompt[name] for name in ("pixel_values", "image_grid_thw") if name in prompt}


def ragged_collator(tokenizer: Any) -> Callable[[Sequence[Rows]], Rows]:
    """The tutorial's padding, with the patches of all images one after the other instead of stacked."""
    pad = padding_collator(tokenizer)

    def collate(rows: Sequence[Rows]) -> Rows:
        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        grids = [row["image_grid_thw"] for row in rows if "image_grid_thw" in row]
        text = [
            {name: row[name] for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")} for row in rows
        ]
        made = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if pixels else {}
        return pad(text) | made

    return collate


def _coco_rows(task: Task) -> Dataset:
    lines = [_tutorial_row(task.home, example) for example in task.workload.examples]
    task.settings.data.write_text(json.dumps(lines))
    settings, processor, rows = task.settings, task.processor, load_rows(task.settings)
    return rows.map(
        lambda row: encode(row, settings, processor.tokenizer, processor),
        remove_columns=rows.column_names,
        new_fingerprint="encoded",  # else datasets looks through all that the function can reach
    )


def _tutorial_row(home: Path, example: Example) -> Rows:
    question = f"COCO Yes: <|vision_start|>{home / example.image_paths[0]}<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": example.answer}]
    return {"id": example.id, "conversations": turns}


def _trl_rows(task: Task) -> Dataset:
    """Prompts as the template renders them, answers with the end token, and images in their target size."""
    folder = task.home / "resized"
    folder.mkdir(exist_ok=True)
    rows: dict[str, list[Any]] = {"prompt": [], "completion": [], "images": []}
    for example in task.workload.examples:
        for path in example.image_paths:
            if not (folder / path).with_suffix(".png").exists():
                resized = resize_image(task.collator.open_image(path, 0), task.workload.budget, SHAPE)
                resized.save((folder / path).with_suffix(".png"))
        messages = messages_to_json(example.prompt)
        prompt = task.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows["prompt"].append(prompt)
        rows["completion"].append(example.answer + END_TOKEN)
        rows["images"].append([str((folder / path).with_suffix(".png")) for path in example.image_paths])
    kinds = Features({"prompt": Value("string"), "completion": Value("string"), "images": Several(Image())})
    return Dataset.from_dict(rows, features=kinds)


def _with_paths(message: Rows, home: Path) -> Rows:
    parts = [
        part | {"image": str(home / part["image"])} if part["type"] == "image" else part for part in message["content"]
    ]
    return message | {"content": parts}


def _take_gradient(model: torch.nn.Module) -> Gradient:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def _runner(trainer: Any) -> Callable[[], None]:
    trainer.remove_callback(PrinterCallback)

    def run() -> None:
        trainer.train()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run
